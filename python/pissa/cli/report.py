"""`pissa report`: reports a checkpoint's spectra, errors of quantised bases, ranks for a budget, and training
memory."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pissa.cli.folders import FolderCommand, as_range
from pissa.cli.terminal import as_size, format_table, positive_int, say

if TYPE_CHECKING:
    from pissa.checkpoints.spectra import Report

_MEMORY_PARTS = {
    "weights": "weights",
    "start": "start factors A0, B0",
    "trained": "trained dA, dB",
    "gradients": "gradients",
    "optimizer": "AdamW",
    "activations": "activations, about",
    "total": "total, about",
}
"""Names of the parts of the memory that training takes."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the model, or its name on the Hugging Face Hub")
    parser.add_argument("--quant", choices=("nf4", "int8"), help="report the errors of bases in this format too")
    ranks = "ranks of adapters (default: 16 64 128)"
    parser.add_argument("--rank", type=positive_int, nargs="+", metavar="N", help=ranks)
    parser.add_argument(
        "--budget",
        type=positive_int,
        metavar="PARAMETERS",
        help="trained parameters for the suggested ranks (default: as many as the smallest rank has)",
    )
    parser.add_argument("--sample", type=positive_int, metavar="N", help="quantise only N layers of each kind")
    parser.add_argument("--exact", action="store_true", help="compute all singular values (slow for large matrices)")
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="sequences in a step (for the memory)"
    )
    parser.add_argument(
        "--length", type=positive_int, default=512, metavar="N", help="tokens in a sequence (for the memory)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _report(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pissa.checkpoints.spectra import Summary, report

    options = {"quant": args.quant, "budget": args.budget, "sampled": args.sample, "exact": args.exact}
    found = report(args.model, args.rank or (16, 64, 128), **options, batch=args.batch, length=args.length)
    yield found.numbers
    kept = (
        f"{format}: {one['bits']:.3g} bits a weight, {as_size(one['bytes'])}"
        for format, one in found.numbers["formats"].items()
    )
    layers, ranks = found.kinds["all"].layers, found.numbers["ranks"]
    adapted = sum(math.prod(layer.shape) for layer in layers)
    say("model", f"{args.model}: {len(layers)} layers of {adapted:,} parameters to adapt")
    say("files", "; ".join(kept))
    if args.exact:
        say("spectrum", "all singular values, from Gram matrices in float64")
    else:
        how = "as PiSSA's own decomposition finds them: never above the true ones"
        say("spectrum", f"the first {found.suggestion.largest_rank} singular values, {how}")
    header = ("energy held by rank", "layers", "shape", "stable\nrank", *(f"\n{rank}" for rank in ranks))
    rows = []
    for kind, some in found.kinds.items():
        shapes = {" x ".join(map(str, layer.shape)) for layer in some.layers}
        shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
        stable = as_range([round(layer.stable_rank) for layer in some.layers])
        rows.append([kind, str(len(some.layers)), shape, stable, *(f"{some.energy(rank):.1%}" for rank in ranks)])
    print(f"\n{format_table(header, rows)}\n")
    if args.quant is not None:
        _print_errors(found)
    held = {layer.name: Summary([layer]).energy(ranks[0]) for layer in layers}
    rows = [[name, f"{held[name]:.1%}"] for name in sorted(held, key=held.__getitem__)[:5]]
    print(format_table((f"least energy held by rank {ranks[0]}", ""), rows) + "\n")
    best, even = found.suggestion, found.suggestion.uniform
    say("ranks", f"for {best.budget:,} trained parameters: {best.parameters:,} lose {best.lost:.2%} of the energy;")
    say("", f"rank {even['r']} in every layer: {even['parameters']:,} lose {even['lost']:.2%}")
    if at_most := sum(rank >= best.largest_rank for rank in best.ranks.values()):
        looked = f"{at_most} layers have rank {best.largest_rank}, the largest that was looked at"
        say("", f"{looked}; give --rank a larger one to look further")
    pattern = f", rank_pattern={json.dumps(best.rank_pattern)}" if best.rank_pattern else ""
    print(f"\nPissaConfig(r={best.r}{pattern})\n")
    memory = found.numbers["memory"]
    rows = [
        [words, *(as_size(memory[kind][part]) for kind in ("plain", "checkpointing"))]
        for part, words in _MEMORY_PARTS.items()
    ]
    head = f"training at rank {memory['rank']},\n{memory['batch']} x {memory['length']} tokens"
    print(format_table((head, "\nmemory", "gradient\ncheckpointing"), rows) + "\n")
    say("time", f"{found.numbers['seconds']:.0f} s")


def _print_errors(report: Report) -> None:
    kinds = {kind: some for kind, some in report.kinds.items() if some.quantised}
    layers, quantised = report.kinds["all"].layers, report.kinds["all"].quantised
    for rank in report.numbers["ranks"]:
        methods = [method for method in quantised[0].errors if method[1] == rank]
        header = [f"{report.numbers['quant']}, rank {rank}", "QLoRA\nerror"]
        header += [cell for method, _ in methods for cell in (f"{method}\nerror", "\nremoved")]
        rows = []
        for kind, some in kinds.items():
            each = (cell for way in methods for cell in (f"{some.error(way):.2%}", f"{some.removed(way):.1%}"))
            rows.append([kind, f"{some.error():.2%}", *each])
        print(f"{format_table(header, rows)}\n")
    say("notes", "error: ‖W - Q - s B A‖ / ‖W‖, Frobenius norms; removed: the share of QLoRA's that is gone.")
    if len(quantised) < len(layers):
        say("", f"Of {len(quantised)} of the {len(layers)} layers, evenly spaced in each kind.")
    print()


REPORT = FolderCommand(_add_arguments, _report)

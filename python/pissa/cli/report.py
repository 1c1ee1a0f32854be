"""`pissa report`: reports a checkpoint's spectra, errors of quantised bases, ranks for a budget, and training
memory."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pissa.cli.folders import FolderCommand, as_range
from pissa.cli.terminal import as_size, format_table, positive_int, print_row

if TYPE_CHECKING:
    from pissa.checkpoints.spectra import Report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, dict[str, Any](type=positive_int, metavar="N")
    add("model", metavar="MODEL", help="folder of the model, or its name on the Hugging Face Hub")
    add("--quant", choices=("nf4", "int8"), help="report the errors of bases in this format too")
    add("--rank", nargs="+", default=(16, 64, 128), help="ranks of adapters", **count)
    budget = "number of trained parameters for the suggested ranks (default: as many as the smallest rank has)"
    add("--budget", help=budget, **count)
    add("--sample", help="quantise only N layers of each kind", **count)
    add("--exact", action="store_true", help="compute all singular values (slow for large matrices)")
    add("--batch", default=1, help="sequences in a step (for the memory)", **count)
    add("--length", default=512, help="tokens in a sequence (for the memory)", **count)
    add("--json", action="store_true", help="print one JSON object instead of tables")


def _report(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pissa.checkpoints.spectra import Summary, report

    options = {"quant": args.quant, "budget": args.budget, "sampled": args.sample, "exact": args.exact}
    results = report(args.model, args.rank, **options, batch=args.batch, length=args.length)
    yield results.numbers
    formats = results.numbers["formats"].items()
    files = (f"{name}: {tensors['bits']:.3g} bits a weight, {as_size(tensors['bytes'])}" for name, tensors in formats)
    layers, ranks = results.kinds["all"].layers, results.numbers["ranks"]
    adapted = sum(math.prod(layer.shape) for layer in layers)
    print_row("model", f"{args.model}: {len(layers)} layers of {adapted:,} parameters to adapt")
    print_row("files", "; ".join(files))
    if args.exact:
        print_row("spectrum", "all singular values, from Gram matrices in float64")
    else:
        how = "as PiSSA's own decomposition finds them: never above the true ones"
        print_row("spectrum", f"the first {results.suggestion.largest_rank} singular values, {how}")
    header = ("energy held by rank", "layers", "shape", "stable\nrank", *(f"\n{rank}" for rank in ranks))
    rows = []
    for kind, summary in results.kinds.items():
        shapes = {" x ".join(map(str, layer.shape)) for layer in summary.layers}
        shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
        stable = as_range([round(layer.stable_rank) for layer in summary.layers])
        rows.append([kind, str(len(summary.layers)), shape, stable, *(f"{summary.energy(rank):.1%}" for rank in ranks)])
    print(f"\n{format_table(header, rows)}\n")
    if args.quant is not None:
        _print_errors(results)
    held = {layer.name: Summary([layer]).energy(ranks[0]) for layer in layers}
    rows = [[name, f"{held[name]:.1%}"] for name in sorted(held, key=held.__getitem__)[:5]]
    print(format_table((f"least energy held by rank {ranks[0]}", ""), rows) + "\n")
    best, even = results.suggestion, results.suggestion.uniform
    print_row("ranks", f"for {best.budget:,} parameters: {best.parameters:,} lose {best.lost:.2%} of the energy;")
    print_row("", f"rank {even['r']} in every layer: {even['parameters']:,} lose {even['lost']:.2%}")
    if at_most := sum(rank >= best.largest_rank for rank in best.ranks.values()):
        looked = f"{at_most} layers have rank {best.largest_rank}, the largest that was looked at"
        print_row("", f"{looked}; give --rank a larger one to look further")
    pattern = f", rank_pattern={json.dumps(best.rank_pattern)}" if best.rank_pattern else ""
    print(f"\nPissaConfig(r={best.r}{pattern})\n")
    memory = results.numbers["memory"]
    step = f"a step at rank {memory['rank']}, {memory['batch']} x {memory['length']} tokens"
    for part, label in (("plain", step), ("checkpointing", "with gradient checkpointing")):
        sizes = {name: as_size(size) for name, size in memory[part].items()}
        adapter = as_size(sum(memory[part][name] for name in ("start", "trained", "gradients", "optimizer")))
        parts = f"weights {sizes['weights']}, adapter and AdamW {adapter}, activations {sizes['activations']}"
        print_row("memory", f"{label}: about {sizes['total']} ({parts})")
    print_row("time", f"{results.numbers['seconds']:.0f} s")


def _print_errors(report: Report) -> None:
    kinds = {kind: summary for kind, summary in report.kinds.items() if summary.quantised}
    layers, quantised = report.kinds["all"].layers, report.kinds["all"].quantised
    for rank in report.numbers["ranks"]:
        methods = [method for method in quantised[0].errors if method[1] == rank]
        header = [f"{report.numbers['quant']}, rank {rank}", "QLoRA\nerror"]
        header += [cell for method, _ in methods for cell in (f"{method}\nerror", "\nremoved")]
        rows = []
        for kind, summary in kinds.items():
            cells = ((f"{summary.error(method):.2%}", f"{summary.removed(method):.1%}") for method in methods)
            rows.append([kind, f"{summary.error():.2%}", *itertools.chain(*cells)])
        print(f"{format_table(header, rows)}\n")
    print_row("notes", "error: ‖W - Q - s B A‖ / ‖W‖, Frobenius norms; removed: the share of QLoRA's that is gone.")
    if len(quantised) < len(layers):
        print_row("", f"Of {len(quantised)} of the {len(layers)} layers, evenly spaced in each kind.")
    print()


REPORT = FolderCommand(_add_arguments, _report)

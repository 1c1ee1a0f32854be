"""`pissa report`: what a checkpoint holds for PiSSA: spectra, errors of quantised bases, ranks for a budget, memory."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from pissa.cli.arguments import positive_int
from pissa.cli.terminal import as_size, format_table, say, silence_third_parties, told
from pissa.files.staged import check_unused, staged

if TYPE_CHECKING:
    from pissa.checkpoints.report import Report

NUMBERS = "report.json"
RANKS = (16, 64, 128)

_WORST = 5

_MEMORY_PARTS = {
    "weights": "weights",
    "start": "start factors A0, B0",
    "trained": "trained dA, dB",
    "gradients": "gradients",
    "optimizer": "AdamW",
    "activations": "activations, about",
    "total": "total, about",
}
"""The parts of the memory of training, in words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the model, or its name on the Hugging Face Hub")
    parser.add_argument("--quant", choices=("nf4", "int8"), help="report the errors of bases in this format too")
    ranks = " ".join(map(str, RANKS))
    parser.add_argument(
        "--rank", type=positive_int, nargs="+", metavar="N", help=f"ranks of adapters (default: {ranks})"
    )
    parser.add_argument(
        "--budget",
        type=positive_int,
        metavar="PARAMETERS",
        help="trained parameters that the suggested ranks may have; by default what the smallest rank has",
    )
    parser.add_argument(
        "--sample", type=positive_int, metavar="N", help="quantise N layers of each kind, evenly spaced, instead of all"
    )
    parser.add_argument("--exact", action="store_true", help="all singular values: slow for large matrices")
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="sequences of a step, for the memory"
    )
    parser.add_argument("--length", type=positive_int, default=512, metavar="N", help="tokens of a sequence")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the numbers and pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Reports on one checkpoint. Returns the exit code.

    Raises:
        UserError: for a folder that holds no such model, or numbers that do not fit it.
    """
    silence_third_parties()
    if args.out is not None:
        with told(ValueError, before="--out "):
            check_unused(args.out)
    from pissa.checkpoints.report import report

    with told(OSError, ValueError):
        found = report(
            args.model,
            args.rank or RANKS,
            quant=args.quant,
            budget=args.budget,
            sampled=args.sample,
            exact=args.exact,
            batch=args.batch,
            length=args.length,
        )
    numbers = json.dumps(found.as_dict(), indent=2)
    if args.out is not None:
        from pissa.cli.report_pictures import pictures

        with staged(args.out) as new:
            for name, png in pictures(found).items():
                new(f"{name}.png").write_bytes(png)
            new(NUMBERS).write_text(f"{numbers}\n")
    if args.json:
        print(numbers)
    else:
        _print_tables(found)
        if args.out is not None:
            say("written", f"{args.out / NUMBERS} and pictures")
    return 0


def _print_tables(report: Report) -> None:
    _print_model(report)
    print(f"\n{_energies(report)}\n")
    if report.quant is not None:
        _print_errors(report)
    rank = report.ranks[0]
    energies = {layer.name: layer.energy(rank) for layer in report.layers}
    least = sorted(energies, key=lambda name: energies[name])[:_WORST]
    rows = [(name, f"{energies[name]:.1%}") for name in least]
    print(format_table((f"least energy held by rank {rank}", ""), rows) + "\n")
    _print_ranks(report)
    _print_memory(report)
    say("time", f"{report.seconds:.0f} s")


def _print_model(report: Report) -> None:
    adapted = sum(math.prod(layer.shape) for layer in report.layers)
    say("model", f"{report.model}: {len(report.layers)} layers of {adapted:,} parameters to adapt")
    if report.exact:
        say("spectrum", "all singular values, from Gram matrices in float64")
    else:
        found = "as PiSSA's own decomposition finds them: never above the true ones"
        say("spectrum", f"the first {report.known} singular values, {found}")


def _energies(report: Report) -> str:
    header = ("energy held by rank", "layers", "shape", "stable\nrank", *(f"\n{rank}" for rank in report.ranks))
    rows = []
    for kind, some in report.summaries.items():
        shapes = {" x ".join(map(str, layer.shape)) for layer in some.layers}
        stable = [layer.stable_rank for layer in some.layers]
        low, high = f"{min(stable):.0f}", f"{max(stable):.0f}"
        rows.append(
            [
                kind,
                str(len(some.layers)),
                shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes",
                low if low == high else f"{low} to {high}",
                *(f"{some.energy(rank):.1%}" for rank in report.ranks),
            ]
        )
    return format_table(header, rows)


def _print_errors(report: Report) -> None:
    summaries = {kind: some for kind, some in report.summaries.items() if some.quantised}
    whole = summaries["all"]
    for rank in report.ranks:
        methods = [method for method in whole.methods if method[1] == rank]
        header = [f"{report.quant}, rank {rank}", "QLoRA\nerror"]
        header += [cell for method, _ in methods for cell in (f"{method}\nerror", "\nremoved")]
        rows = []
        for kind, some in summaries.items():
            row = [kind, f"{some.error():.2%}"]
            for method in methods:
                row += [f"{some.error(method):.2%}", f"{some.removed(method):.1%}"]
            rows.append(row)
        print(f"{format_table(header, rows)}\n")
    say("notes", "error: ‖W - Q - s B A‖ / ‖W‖, Frobenius norms; removed: the share of QLoRA's that is gone.")
    if len(whole.quantised) < len(report.layers):
        say("", f"Of {len(whole.quantised)} of the {len(report.layers)} layers, evenly spaced in each kind.")
    print()


def _print_ranks(report: Report) -> None:
    """The ranks for the budget: what they use and lose, beside one rank for all, and a configuration to paste."""
    found, even = report.suggestion, report.suggestion.uniform
    text = (
        f"For {found.budget:,} trained parameters, these ranks use {found.parameters:,} and lose {found.lost:.2%} of "
        f"the energy; rank {even['r']} in every layer uses {even['parameters']:,} and loses {even['lost']:.2%}."
    )
    if at_most := sum(rank >= found.largest_rank for rank in found.ranks.values()):
        text += (
            f" {at_most} layers have rank {found.largest_rank}, the largest that was looked at; give --rank a larger "
            "one to look further."
        )
    for number, line in enumerate(textwrap.wrap(text, 100)):
        say("" if number else "ranks", line)
    pattern = f", rank_pattern={json.dumps(found.rank_pattern)}" if found.rank_pattern else ""
    print(f"\nPissaConfig(r={found.r}{pattern})\n")


def _print_memory(report: Report) -> None:
    rows = [
        (words, *(as_size(report.memory[kind][part]) for kind in ("plain", "checkpointing")))
        for part, words in _MEMORY_PARTS.items()
    ]
    head = f"training at rank {report.memory['rank']},\n{report.memory['batch']} x {report.memory['length']} tokens"
    print(format_table((head, "\nmemory", "gradient\ncheckpointing"), rows) + "\n")

"""A report in the terminal: tables by kind of layer, the layers that lose most, ranks to paste, memory."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pissa.checkpoints.layer_report import by_kind
from pissa.checkpoints.quant_errors import PLAIN
from pissa.checkpoints.report import Report
from pissa.cli.report_words import MEMORY_PARTS, count, notes, paste, ranks_in_words, shape_of
from pissa.cli.terminal import as_size, format_table, say

_WORST = 5


def print_tables(report: Report) -> None:
    """Prints the whole report."""
    _print_model(report)
    _print_energy(report)
    if report.quant is not None:
        _print_errors(report)
    _print_worst(report)
    _print_suggestion(report)
    _print_memory(report)
    say("time", f"{report.seconds:.0f} s")


def _print_model(report: Report) -> None:
    adapted = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    say("model", f"{report.model}: {len(report.layers)} layers of {count(adapted)} parameters to adapt")
    if report.exact:
        say("spectrum", "all singular values, from Gram matrices in float64")
    else:
        say(
            "spectrum",
            f"the first {report.known} singular values, as PiSSA's own decomposition finds them: never above the "
            "true ones",
        )


def _print_energy(report: Report) -> None:
    header = ("energy held by rank", "layers", "shape", "stable\nrank", *(f"\n{rank}" for rank in report.ranks))
    rows = []
    for kind, some in {**by_kind(report.layers), "all": report.whole}.items():
        stable = _range([layer.spectrum.stable_rank for layer in some.layers])
        energies = [f"{some.energy(rank):.1%}" for rank in report.ranks]
        rows.append([kind, str(len(some.layers)), shape_of(some), stable, *energies])
    print(f"\n{format_table(header, rows)}\n")


def _print_errors(report: Report) -> None:
    whole = report.whole
    kinds = {kind: some for kind, some in by_kind(report.layers).items() if some.quantised}
    for rank in report.ranks:
        methods = [method for method in whole.methods if method[1] == rank]
        header = [f"{report.quant}, rank {rank}", f"{PLAIN}\nerror"]
        header += [cell for method, _ in methods for cell in (f"{method}\nerror", "\nremoved")]
        rows = []
        for kind, some in {**kinds, "all": whole}.items():
            row = [kind, f"{some.error((PLAIN, 0)):.2%}"]
            for method in methods:
                row += [f"{some.error(method):.2%}", f"{some.removed(method)[0]:.1%}"]
            rows.append(row)
        print(f"{format_table(header, rows)}\n")
    for number, note in enumerate(notes(report)):
        say("" if number else "notes", note)
    print()


def _print_worst(report: Report) -> None:
    rank = report.ranks[0]
    least = sorted(report.layers, key=lambda layer: layer.spectrum.energy(layer.rank(rank)))[:_WORST]
    rows = [(layer.name, f"{layer.spectrum.energy(layer.rank(rank)):.1%}") for layer in least]
    print(format_table((f"least energy held by rank {rank}", ""), rows) + "\n")


def _print_suggestion(report: Report) -> None:
    for number, line in enumerate(textwrap.wrap(ranks_in_words(report.suggestion), 100)):
        say("" if number else "ranks", line)
    print(f"\n{paste(report.suggestion)}")


def _print_memory(report: Report) -> None:
    rows = [
        (words, *(as_size(getattr(report.memory[checkpointing], part)) for checkpointing in (False, True)))
        for part, words in MEMORY_PARTS.items()
    ]
    head = f"training at rank {report.ranks[0]},\n{report.batch} x {report.length} tokens"
    print("\n" + format_table((head, "\nmemory", "gradient\ncheckpointing"), rows) + "\n")


def _range(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.0f}", f"{max(numbers):.0f}"
    return low if low == high else f"{low} to {high}"

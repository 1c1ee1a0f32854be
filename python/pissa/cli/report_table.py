"""A report in the terminal: tables by kind of layer, the layers that lose most, ranks to paste, memory."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence

from pissa.checkpoints.layer_report import Summary, by_kind
from pissa.checkpoints.quant_errors import PLAIN
from pissa.checkpoints.report import Report
from pissa.checkpoints.suggestion import Suggestion
from pissa.cli.terminal import as_size, format_table, say

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
"""The parts of a `TrainingMemory`, in words."""


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
    say("model", f"{report.model}: {len(report.layers)} layers of {_count(adapted)} parameters to adapt")
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
        rows.append([kind, str(len(some.layers)), _shape_of(some), stable, *energies])
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
                row += [f"{some.error(method):.2%}", f"{some.removed(method):.1%}"]
            rows.append(row)
        print(f"{format_table(header, rows)}\n")
    say("notes", f"error: ‖W - Q - s B A‖ / ‖W‖, Frobenius norms; removed: the share of {PLAIN}'s that is gone.")
    if len(whole.quantised) < len(report.layers):
        say("", f"Of {len(whole.quantised)} of the {len(report.layers)} layers, evenly spaced in each kind.")
    print()


def _print_worst(report: Report) -> None:
    rank = report.ranks[0]
    least = sorted(report.layers, key=lambda layer: layer.spectrum.energy(layer.rank(rank)))[:_WORST]
    rows = [(layer.name, f"{layer.spectrum.energy(layer.rank(rank)):.1%}") for layer in least]
    print(format_table((f"least energy held by rank {rank}", ""), rows) + "\n")


def _print_suggestion(report: Report) -> None:
    for number, line in enumerate(textwrap.wrap(_ranks_in_words(report.suggestion), 100)):
        say("" if number else "ranks", line)
    print(f"\n{_paste(report.suggestion)}")


def _print_memory(report: Report) -> None:
    rows = [
        (words, *(as_size(getattr(report.memory[checkpointing], part)) for checkpointing in (False, True)))
        for part, words in _MEMORY_PARTS.items()
    ]
    head = f"training at rank {report.ranks[0]},\n{report.batch} x {report.length} tokens"
    print("\n" + format_table((head, "\nmemory", "gradient\ncheckpointing"), rows) + "\n")


def _range(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.0f}", f"{max(numbers):.0f}"
    return low if low == high else f"{low} to {high}"


def _ranks_in_words(suggestion: Suggestion) -> str:
    """What the suggested ranks take and lose, beside one rank for all."""
    text = (
        f"For {suggestion.budget:,} trained parameters, these ranks use {suggestion.parameters:,} and lose "
        f"{suggestion.lost:.2%} of the energy; rank {suggestion.uniform} in every layer uses "
        f"{suggestion.uniform_parameters:,} and loses {suggestion.uniform_lost:.2%}."
    )
    at_most = sum(rank >= suggestion.largest for rank in suggestion.ranks.values())
    if at_most:
        text += (
            f" {at_most} layers have rank {suggestion.largest}, the largest that was looked at; give --rank a larger "
            "one to look further."
        )
    return text


def _paste(suggestion: Suggestion) -> str:
    """The suggested ranks as Python, to be pasted."""
    r, pattern = suggestion.pattern()
    return f"PissaConfig(r={r}, rank_pattern={json.dumps(pattern)})" if pattern else f"PissaConfig(r={r})"


def _shape_of(some: Summary) -> str:
    """The shape of the matrices, or how many shapes they have."""
    shapes = sorted({layer.shape for layer in some.layers})
    return " x ".join(map(str, shapes[0])) if len(shapes) == 1 else f"{len(shapes)} shapes"


def _count(number: int) -> str:
    """A number in three digits: "1.23 billion"."""
    for limit, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= limit:
            return f"{number / limit:.3g} {word}"
    return str(number)

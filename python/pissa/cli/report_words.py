"""What the table and the page of a report say alike: numbers in words, notes, the line to paste."""

from __future__ import annotations

import json

from pissa.checkpoints.layer_report import Summary
from pissa.checkpoints.nuclear import EXACT_SIDE
from pissa.checkpoints.quant_errors import PLAIN
from pissa.checkpoints.report import Report
from pissa.checkpoints.suggestion import Suggestion

MEMORY_PARTS = {
    "weights": "weights",
    "start": "start factors A0, B0",
    "trained": "trained dA, dB",
    "gradients": "gradients",
    "optimizer": "AdamW",
    "activations": "activations, about",
    "total": "total, about",
}
"""The parts of a `TrainingMemory`, in words."""


def notes(report: Report) -> list[str]:
    """What the numbers of the errors are."""
    whole = report.whole
    found = [
        "error: ‖W - Q - s B A‖ / ‖W‖, Frobenius norms.",
        f"removed: the share of {PLAIN}'s error that is gone, in nuclear norms as in the paper.",
    ]
    if worst := max(whole.removed(method)[1] for method in whole.methods):
        found.append(
            f"Nuclear norms are estimated where both sides are above {EXACT_SIDE}; standard error over all layers: "
            f"{100 * worst:.2f} points."
        )
    if len(whole.quantised) < len(report.layers):
        found.append(f"Of {len(whole.quantised)} of the {len(report.layers)} layers, evenly spaced in each kind.")
    return found


def ranks_in_words(suggestion: Suggestion) -> str:
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


def paste(suggestion: Suggestion) -> str:
    """The suggested ranks as Python, to be pasted."""
    r, pattern = suggestion.pattern()
    return f"PissaConfig(r={r}, rank_pattern={json.dumps(pattern)})" if pattern else f"PissaConfig(r={r})"


def shape_of(some: Summary) -> str:
    """The shape of the matrices, or how many shapes they have."""
    shapes = sorted({layer.shape for layer in some.layers})
    return " x ".join(map(str, shapes[0])) if len(shapes) == 1 else f"{len(shapes)} shapes"


def count(number: int) -> str:
    """A number in three digits: "1.23 billion"."""
    for limit, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= limit:
            return f"{number / limit:.3g} {word}"
    return str(number)

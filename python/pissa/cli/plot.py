"""The picture of a run: loss against step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pissa.cli import colours
from pissa.files.staged import staged

# By method; the line styles differ in grey.
_STYLES: dict[str, dict[str, Any]] = {
    "PiSSA": {"color": colours.PISSA, "linestyle": "-"},
    "QPiSSA": {"color": colours.QPISSA, "linestyle": (0, (5, 1.5))},
    "LoRA": {"color": colours.LORA, "linestyle": (0, (1, 1.2))},
}


class Curve(NamedTuple):
    """The loss of one run: `losses[i]` is that of step `steps[i]`."""

    label: str
    """The method, PiSSA, QPiSSA or LoRA, and what else is to be said after a space."""
    steps: Sequence[int]
    losses: Sequence[float]

    @property
    def style(self) -> dict[str, Any]:
        """How its line looks: the method's way."""
        return _STYLES[self.label.partition(" ")[0]]


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The running mean over `window` (odd) values; near the ends, over those that exist."""
    half = window // 2
    return [float(np.mean(losses[max(0, i - half) : i + half + 1])) for i in range(len(losses))]


def plot_losses(curves: Sequence[Curve], path: Path, title: str, unit: str = "answer token") -> None:
    """Draws each step thin and the running mean thick, and writes a PNG. Losses are nats per `unit`."""
    # The object interface: no window system, and no global state of pyplot.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    window = max(1, max(len(curve.losses) for curve in curves) // 6) | 1
    for curve in curves:
        mean = smoothed(curve.losses, window)
        if window > 1:
            axes.plot(curve.steps, curve.losses, color=curve.style["color"], linewidth=0.7, alpha=0.3)
        marker = "o" if len(mean) == 1 else None
        axes.plot(curve.steps, mean, linewidth=2.2, marker=marker, label=curve.label, **curve.style)
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20 if window > 1 else 6)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"training loss (nats per {unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if window > 1:
        note = f"thick: mean of {window} steps; thin: each step"
        axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color="0.35")
    with staged(path.parent) as new:
        figure.savefig(new(path.name), dpi=160, format="png")

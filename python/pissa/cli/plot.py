"""The picture of a run: loss against step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pissa.files.staged import Staged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of Okabe and Ito differ to every kind of colour blindness; the line styles differ in grey.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": (0, (5, 1.5))},
    {"color": "#000000", "linestyle": (0, (1, 1.2))},
    {"color": "#009E73", "linestyle": (0, (6, 1.5, 1, 1.5))},
)


class Curve(NamedTuple):
    """The loss of one run: `losses[i]` is that of step `steps[i]`."""

    label: str
    steps: Sequence[int]
    losses: Sequence[float]


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The running mean over `window` (odd) values; near the ends, over those that exist."""
    half = window // 2
    return [float(np.mean(losses[max(0, i - half) : i + half + 1])) for i in range(len(losses))]


def plot_losses(curves: Sequence[Curve], path: Path, title: str, unit: str = "answer token") -> None:
    """Draws up to four curves, each step thin and the running mean thick, and writes a PNG. Losses are nats per `unit`.

    Raises:
        ValueError: no curve, or more than there are styles.
    """
    if not 1 <= len(curves) <= len(_STYLES):
        raise ValueError(f"curves: got {len(curves)}; allowed: 1 to {len(_STYLES)}")
    # The object interface: no window system, and no global state of pyplot.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    longest = max(len(curve.losses) for curve in curves)
    window = max(1, longest // 6) | 1
    ends = []
    for curve, style in zip(curves, _STYLES, strict=False):
        mean = smoothed(curve.losses, window)
        if window > 1:
            axes.plot(curve.steps, curve.losses, color=style["color"], linewidth=0.7, alpha=0.3)
        marker = "o" if len(mean) == 1 else None
        axes.plot(curve.steps, mean, linewidth=2.2, marker=marker, **style)
        ends.append((mean[-1], curve, style))
    _label_ends(axes, ends)
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
    with Staged(path.parent) as staged:
        figure.savefig(staged.path(path.name), dpi=160, format="png")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, Curve, dict[str, Any]]]) -> None:
    """Writes the name of each curve at its end. Names whose curves end close together are moved apart."""
    low, high = axes.get_ylim()
    apart = 0.055 * (high - low)
    place = -float("inf")
    for height, curve, style in sorted(ends, key=lambda end: end[0]):
        place = max(height, place + apart)
        axes.annotate(
            curve.label,
            (curve.steps[-1], height),
            xytext=(1.015, place),
            textcoords=("axes fraction", "data"),
            va="center",
            color=style["color"],
            fontweight="bold",
            annotation_clip=False,
        )

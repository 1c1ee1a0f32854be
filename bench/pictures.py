"""The picture of the losses of runs, and the colours that all pictures of bench and of the book use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pissa.containers.staged import staged

# A method has one colour everywhere, of Okabe and Ito's, which every kind of colour blindness distinguishes.
LORA, PISSA, QPISSA, QLORA = "#0072B2", "#D55E00", "#CC79A7", "#009E73"

STYLES: dict[str, dict[str, Any]] = {
    "PiSSA": {"color": PISSA, "linestyle": "-"},
    "QPiSSA": {"color": QPISSA, "linestyle": (0, (5, 1.5))},
    "LoRA": {"color": LORA, "linestyle": (0, (1, 1.2))},
    "QLoRA": {"color": QLORA, "linestyle": (0, (3, 1, 1, 1))},
}
"""Line styles by method, so that lines are distinguishable in grey."""

_PAGE = {
    "axes.formatter.min_exponent": 2,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "grid.color": "0.85",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The running mean over `window` (odd) values. Near the ends, over those that exist."""
    half = window // 2
    return [fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


@mpl.rc_context(_PAGE)
def draw_losses(
    runs: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    path: Path,
    title: str,
    unit: str = "answer token",
    held_out: tuple[Sequence[int], Sequence[float]] = ((), ()),
) -> None:
    """Draws the losses of runs, in nats per `unit`, over their steps, and writes a PNG. The losses are thin lines,
    their running means thick ones.

    Args:
        runs: by label: the method, PiSSA, QPiSSA, LoRA or QLoRA, and after a space anything else to be shown.
        held_out: steps and losses of held-out data, drawn as points.
    """
    # The object interface needs no window system and no global state of pyplot.
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    window = max(1, max(len(losses) for _, losses in runs.values()) // 6) | 1
    for label, (steps, losses) in runs.items():
        style = STYLES[label.partition(" ")[0]]
        axes.plot(steps, losses, color=style["color"], linewidth=0.7, alpha=0.3)
        marker = "o" if len(losses) == 1 else None
        axes.plot(steps, smoothed(losses, window), linewidth=2.2, marker=marker, label=label, **style)
    if held_out[0]:
        axes.plot(*held_out, color="0.2", linewidth=1, marker="o", markersize=4, label="held out")
    axes.legend(labelcolor="linecolor", title=f"mean of {window} steps" if window > 1 else None)
    axes.set(title=title, xlabel="optimiser step", ylabel=f"loss (nats per {unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    with staged(path.parent) as new:
        figure.savefig(new(path.name), format="png")

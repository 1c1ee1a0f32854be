"""The pictures of runs and of reports. `bench` and the documentation use the same colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

from pissa.containers.staged import staged

if TYPE_CHECKING:
    from pissa.checkpoints.spectra import Report

# Okabe and Ito's colours are distinguishable with every kind of colour blindness. Their yellow is too pale for print.
BLUE, SKY, GREEN, ORANGE, RED, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
BLACK, GREY = "#000000", "#777777"
LORA, PISSA, QPISSA, LOFTQ = BLUE, RED, PINK, GREEN  # a method has one colour everywhere

STYLES: dict[str, dict[str, Any]] = {
    "PiSSA": {"color": PISSA, "linestyle": "-"},
    "QPiSSA": {"color": QPISSA, "linestyle": (0, (5, 1.5))},
    "LoRA": {"color": LORA, "linestyle": (0, (1, 1.2))},
}
"""Line styles by method, so that lines are distinguishable in grey."""

_KINDS = cycler(color=[BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY, BLACK], linestyle=["-", "--", ":", "-."] * 2)
_DEPTH = LinearSegmentedColormap.from_list("depth", (BLUE, "#7E8FA0", ORANGE))
"""The colours from the first block to the last."""

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
    runs: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path, title: str, unit: str = "answer token"
) -> None:
    """Draws the losses of runs, in nats per `unit`, over their steps, and writes a PNG. The losses are thin lines,
    their running means thick ones.

    Args:
        runs: by label: the method, PiSSA, QPiSSA or LoRA, and after a space anything else to be shown.
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
    axes.legend(labelcolor="linecolor", title=f"mean of {window} steps" if window > 1 else None)
    axes.set(title=title, xlabel="optimiser step", ylabel=f"training loss (nats per {unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    with staged(path.parent) as new:
        figure.savefig(new(path.name), format="png")


# ---- A report --------------------------------------------------------------------------------------------------------


@mpl.rc_context(_PAGE | {"axes.prop_cycle": _KINDS, "font.size": 8.5, "savefig.dpi": 200})
def draw_report(report: Report, path: Callable[[str], Path]) -> None:
    """Writes the PNG files: spectra, and energy against rank. `path` gives the path for each name."""
    for name, picture in {"spectra.png": _spectra, "energy.png": _energy}.items():
        figure = Figure(figsize=(4.4, 3.6))  # inches: about full size on a telephone
        picture(report, figure)
        figure.legend(loc="outside upper left", ncols=4)
        figure.savefig(path(name), format="png")


def _spectra(report: Report, figure: Figure) -> None:
    """Singular values of every layer divided by the norm of its weight, one panel for each kind, coloured by depth."""
    kinds = {kind: some.layers for kind, some in report.kinds.items() if kind != "all"}
    rows = math.ceil(len(kinds) / 2)
    figure.set_figheight(0.9 + 1.3 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).flatten()
    for ax, (kind, layers) in zip(axes, kinds.items(), strict=False):
        ends = {len(layers) - 1: "last block", 0: "first block"} if ax is axes[0] else {}
        for number, layer in enumerate(layers):
            values = layer.values.numpy() / math.sqrt(layer.total or 1)
            style = {"color": _DEPTH(number / max(len(layers) - 1, 1)), "linewidth": 0.9}
            ax.loglog(range(1, len(values) + 1), values, label=ends.get(number), **style)
        ax.set_title(kind)
    for ax in axes[len(kinds) :]:
        ax.set_visible(False)
    for ax in axes[len(kinds) - 2 : len(kinds)]:  # the lowest panel of its column
        ax.tick_params(labelbottom=True)
    figure.supxlabel("number of the singular value")
    figure.supylabel("singular value / norm of the weight")


def _energy(report: Report, figure: Figure) -> None:
    """The energy that each rank holds, one line for each kind of layer."""
    ranks = range(report.suggestion.largest_rank + 1)
    ax = figure.subplots()
    ax.set(xlim=(0, ranks[-1]), ylim=(0, 100), xlabel="rank", ylabel="energy held (% of ‖W‖²)")
    for kind, some in report.kinds.items():
        style: dict[str, Any] = {"color": BLACK, "linestyle": "-", "linewidth": 2.4} if kind == "all" else {}
        ax.plot(ranks, [100 * some.energy(rank) for rank in ranks], label=kind, **style)

"""The pictures of a report: spectra, energy against rank, errors of quantised bases."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pissa.checkpoints.report import METHODS, Report
from pissa.cli import colours

_STYLE = {
    "axes.formatter.min_exponent": 2,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.figsize": (4.4, 3.6),  # inches: what a telephone shows in about full size
    "figure.labelsize": "medium",
    "font.size": 8.5,
    "grid.color": "#d7d7d8",
    "legend.frameon": False,
    "savefig.dpi": 200,
}

# Of kinds of layers, after "all". Line styles differ in grey.
_COLOURS = (colours.BLUE, colours.RED, colours.GREEN, colours.PINK, colours.ORANGE, colours.SKY, colours.GREY)
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_DEPTH = LinearSegmentedColormap.from_list("depth", (colours.BLUE, "#7E8FA0", colours.ORANGE))
"""From the first block to the last."""


def draw(report: Report, path: Callable[[str], Path]) -> None:
    """Writes the pictures, PNG files, to the paths of their names."""
    pictures = {"spectra.png": _spectra, "energy.png": _energy}
    if report.numbers["quant"] is not None:
        pictures["errors.png"] = _errors
    with mpl.rc_context(_STYLE):
        for name, picture in pictures.items():
            figure = Figure()  # the object interface: no window system, and no global state of pyplot
            picture(report, figure)
            figure.legend(loc="outside upper left", ncols=4)
            figure.savefig(path(name), format="png")


def _spectra(report: Report, figure: Figure) -> None:
    """Singular values of every layer over the norm of its weight, a panel for each kind, coloured by depth."""
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
    for ax in axes[len(kinds) - 2 : len(kinds)]:  # the lowest of its column
        ax.tick_params(labelbottom=True)
    figure.supxlabel("number of the singular value")
    figure.supylabel("singular value / norm of the weight")


def _energy(report: Report, figure: Figure) -> None:
    """The energy that each rank holds, a line for each kind of layers."""
    ranks = range(report.suggestion.largest_rank + 1)
    ax = figure.subplots()
    ax.set(xlim=(0, ranks[-1]), ylim=(0, 100), xlabel="rank", ylabel="energy held (% of ‖W‖²)")
    for number, (kind, some) in enumerate(report.kinds.items()):
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
        if kind == "all":
            style = {"color": colours.BLACK, "linewidth": 2.4}
        ax.plot(ranks, [100 * some.energy(rank) for rank in ranks], label=kind, **style)


def _errors(report: Report, figure: Figure) -> None:
    """The error of plain quantisation that is gone, a line over the ranks for each kind and method."""
    ranks = report.numbers["ranks"]
    ax = figure.subplots()
    first, second = METHODS
    ax.set(xticks=ranks, xlabel="rank", ylabel=f"error removed (%)\ndotted: {first}, solid: {second}")
    for number, (kind, some) in enumerate(report.kinds.items()):
        colour = colours.BLACK if kind == "all" else _COLOURS[number % len(_COLOURS)]
        for method, line, label in ((first, ":", None), (second, "-", kind)):
            removed = [100 * some.removed((method, rank)) for rank in ranks]
            ax.plot(ranks, removed, color=colour, linestyle=line, marker="o", label=label)

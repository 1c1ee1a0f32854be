"""The pictures of a report: spectra, energy against rank, errors of quantised bases."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from pissa.checkpoints.report import Report
from pissa.cli import colours

_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.figsize": (4.4, 3.3),  # inches: what a telephone shows in about full size
    "figure.labelsize": "medium",
    "font.size": 8.5,
    "grid.color": "#d7d7d8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 200,
}

# Of kinds of layers. Line styles and markers differ in grey.
_COLOURS = (colours.BLUE, colours.RED, colours.GREEN, colours.PINK, colours.ORANGE, colours.SKY)
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = {"QPiSSA T=1": {"markerfacecolor": "none"}, "QPiSSA T=5": {}}
_DEPTH = (colours.BLUE, "#7E8FA0", colours.ORANGE)
"""From the first block to the last."""


def pictures(report: Report) -> dict[str, bytes]:
    """The pictures as PNG, by their names."""
    drawn = {"spectra": _spectra, "energy": _energy}
    if report.quant is not None:
        drawn["errors"] = _errors
    files = {name: io.BytesIO() for name in drawn}
    with mpl.rc_context(_STYLE):
        for name, draw in drawn.items():
            figure = Figure()  # the object interface: no window system, and no global state of pyplot
            draw(report, figure)
            figure.savefig(files[name], format="png")
    return {name: file.getvalue() for name, file in files.items()}


def _spectra(report: Report, figure: Figure) -> None:
    """Singular values of every layer over the norm of its weight, a panel for each kind, coloured by depth."""
    kinds = report.summaries
    del kinds["all"]
    rows = math.ceil(len(kinds) / 2)
    figure.set_figheight(0.9 + 1.3 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
    depth = LinearSegmentedColormap.from_list("depth", _DEPTH)
    for ax, (kind, some) in zip(axes.flat, kinds.items(), strict=False):
        for number, layer in enumerate(some.layers):
            if layer.total:
                values = layer.values.numpy() / math.sqrt(layer.total)
                colour = depth(number / max(len(some.layers) - 1, 1))
                ax.loglog(np.arange(1, len(values) + 1), values, color=colour, linewidth=0.9)
        ax.set_title(kind)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    for ax in axes.flat[len(kinds) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(len(kinds) - 2, 0) : len(kinds)]:  # the lowest of its column
        ax.tick_params(labelbottom=True)
    figure.supxlabel("number of the singular value")
    figure.supylabel("singular value / norm of the weight")
    ends = [Line2D([], [], color=colour, linewidth=2) for colour in (_DEPTH[0], _DEPTH[-1])]
    _legend(figure, ends, ["first block", "last block"])


def _energy(report: Report, figure: Figure) -> None:
    """The energy that each rank holds, a line for each kind of layers."""
    ax = figure.subplots()
    ranks = range(report.known + 1)
    for number, (kind, some) in enumerate(report.summaries.items()):
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
        if kind == "all":
            style = {"color": colours.BLACK, "linewidth": 2.4}
        ax.plot(ranks, [100 * some.energy(rank) for rank in ranks], label=kind, **style)
    ax.set(xlim=(0, report.known), ylim=(0, 100), xlabel="rank", ylabel="energy held (% of ‖W‖²)")
    _legend(figure, *ax.get_legend_handles_labels())


def _errors(report: Report, figure: Figure) -> None:
    """The error that is left of plain quantisation's, a point for each kind, method and rank."""
    kinds = {kind: some for kind, some in report.summaries.items() if some.quantised}
    figure.set_figheight(0.95 + 0.28 * len(kinds))
    axes = figure.subplots(1, len(report.ranks), squeeze=False, sharex=True, sharey=True)[0]
    for ax, rank in zip(axes, report.ranks, strict=True):
        for method, marker in _MARKERS.items():
            removed = [100 * some.removed((method, rank)) for some in kinds.values()]
            ax.plot(removed, range(len(kinds)), "D", color=colours.QPISSA, label=method, **marker)
        ax.set_title(f"rank {rank}")
        ax.grid(axis="x", visible=False)
        ax.set_yticks(range(len(kinds)), kinds)
    axes[0].set_xlim(min(0.0, axes[0].get_xlim()[0]), 103)
    axes[0].invert_yaxis()
    figure.supxlabel("error of plain quantisation removed (%)")
    _legend(figure, *axes[0].get_legend_handles_labels())


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="outside upper left", ncols=4)

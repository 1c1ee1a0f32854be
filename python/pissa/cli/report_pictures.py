"""The pictures of a report: spectra, energy against rank, errors of quantised bases."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pissa.checkpoints.layer_report import by_kind
from pissa.checkpoints.quant_errors import PLAIN
from pissa.checkpoints.report import Report
from pissa.cli import colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _FAINT = "#1a1a1b", "#d7d7d8"

_WIDTH = 4.4  # inches: what a telephone shows in about full size

# Of kinds of layers. Line styles and markers differ in grey.
_COLOURS = (colours.BLUE, colours.RED, colours.GREEN, colours.PINK, colours.ORANGE, colours.SKY)
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_METHODS = {
    "QPiSSA T=1": {"color": colours.QPISSA, "marker": "D", "markerfacecolor": "none"},
    "QPiSSA T=5": {"color": colours.QPISSA, "marker": "D"},
}
# From the first block to the last.
_DEPTH = (colours.BLUE, "#7E8FA0", colours.ORANGE)


def pictures(report: Report) -> dict[str, Figure]:
    """The pictures by their names."""
    drawn: dict[str, Callable[[Report], Figure]] = {"spectra": _spectra, "energy": _energy}
    if report.quant is not None:
        drawn["errors"] = _errors
    return {name: draw(report) for name, draw in drawn.items()}


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    figure.savefig(file, dpi=200, format="png")
    return file.getvalue()


def _figure(height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, np.ndarray[Any, Any]]:
    # The object interface: no window system, and no global state of pyplot.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes.flat:
        ax.tick_params(colors=_INK, labelsize=8.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_INK)
        ax.grid(color=_FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _spectra(report: Report) -> Figure:
    """Singular values of every layer over the norm of its weight, a panel for each kind, coloured by depth."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    kinds = by_kind(report.layers)
    rows = math.ceil(len(kinds) / 2)
    figure, axes = _figure(0.9 + 1.3 * rows, rows, 2, sharex=True, sharey=True)
    depth = LinearSegmentedColormap.from_list("depth", _DEPTH)
    for ax, (kind, some) in zip(axes.flat, kinds.items(), strict=False):
        for number, layer in enumerate(some.layers):
            if layer.spectrum.total:
                values = layer.spectrum.values.numpy() / math.sqrt(layer.spectrum.total)
                colour = depth(number / max(len(some.layers) - 1, 1))
                ax.loglog(np.arange(1, len(values) + 1), values, color=colour, linewidth=0.9)
        ax.set_title(kind, fontsize=9, loc="left", color=_INK, pad=3)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    for ax in axes.flat[len(kinds) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(len(kinds) - 2, 0) : len(kinds)]:  # the lowest of its column
        ax.tick_params(labelbottom=True)
    figure.supxlabel("number of the singular value", fontsize=9, color=_INK)
    figure.supylabel("singular value / norm of the weight", fontsize=9, color=_INK)
    ends = [Line2D([], [], color=colour, linewidth=2) for colour in (_DEPTH[0], _DEPTH[-1])]
    _legend(figure, ends, ["first block", "last block"])
    return figure


def _energy(report: Report) -> Figure:
    """The energy that each rank holds, a line for each kind of layers."""
    figure, axes = _figure(3.3)
    ax = axes[0, 0]
    largest = report.known
    ranks = np.arange(largest + 1)
    for number, (kind, some) in enumerate(by_kind(report.layers).items()):
        energies = [100 * some.energy(int(rank)) for rank in ranks]
        style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
        ax.plot(ranks, energies, linewidth=1.5, label=kind, **style)
    ax.plot(ranks, [100 * report.whole.energy(int(rank)) for rank in ranks], color=_INK, linewidth=2.4, label="all")
    ax.set_xlim(0, largest)
    ax.set_ylim(0, 100)
    ax.set_xlabel("rank", fontsize=9, color=_INK)
    ax.set_ylabel("energy held (% of ‖W‖²)", fontsize=9, color=_INK)
    _legend(figure, *ax.get_legend_handles_labels())
    return figure


def _errors(report: Report) -> Figure:
    """The error that is left of plain quantisation's, a point for each kind, method and rank."""
    kinds = {kind: some for kind, some in by_kind(report.layers).items() if some.quantised} | {"all": report.whole}
    methods = [name for name in dict.fromkeys(name for name, _ in report.whole.methods) if name != PLAIN]
    figure, axes = _figure(0.95 + 0.28 * len(kinds), 1, len(report.ranks), sharey=True, sharex=True)
    for ax, rank in zip(axes.flat, report.ranks, strict=True):
        for method in methods:
            ax.plot(
                [100 * some.removed((method, rank)) for some in kinds.values()],
                range(len(kinds)),
                linestyle="none",
                markersize=6,
                label=method,
                **_METHODS[method],
            )
        ax.set_title(f"rank {rank}", fontsize=9, loc="left", color=_INK, pad=3)
        ax.grid(axis="x", visible=False)
        ax.set_yticks(range(len(kinds)), kinds)
    axes[0, 0].set_xlim(min(0.0, axes[0, 0].get_xlim()[0]), 103)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("error of plain quantisation removed (%)", fontsize=9, color=_INK)
    _legend(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=4,
        fontsize=8.5,
        frameon=False,
        labelcolor=_INK,
        handlelength=2,
        columnspacing=1.2,
    )

"""Pictures of sweeps and curves. The same numbers give the same bytes. They are as wide as a page's text, with letters
of 8 points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

from bench.experiments.experiment import Known
from bench.experiments.methods import METHODS
from bench.experiments.sweep import Spread, Sweep
from bench.pictures import LORA, PISSA, QPISSA

# The rest of Okabe and Ito's colours. Their yellow is too pale for print.
SKY, GREEN, ORANGE = "#56B4E9", "#009E73", "#E69F00"
BLACK, GREY = "#000000", "#777777"
BLUE, RED, PINK, LOFTQ = LORA, PISSA, QPISSA, GREEN

WIDTH = 6.5  # inches: A4's text
DPI = 130
COLORS = 64  # of a PNG's palette: less than half of the bytes. 32 turn blue beside many others into green
SWEEP_NOTE = "n = 1 seed; ringed: the best rate; arrow: diverged, or far above all"
GAP_NOTE = "bars: two standard errors of the differences, seed by seed; each method at its best rate"
HEIGHTS = 1.35  # a loss that is above the lowest one by this factor is drawn at the top edge

mpl.rcParams.update(
    {
        "font.size": 8.5,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "axes.grid": True,
        "grid.color": "0.9",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
    }
)

_SOLID, _DASHED, _DOTTED, _BOTH = "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5))


class Style(NamedTuple):
    """The look of a line. In grey, marker and line style distinguish it from others."""

    color: str
    marker: str
    linestyle: Any
    hollow: bool = False
    """A base in 4 bits."""

    @property
    def point(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker, "markerfacecolor": "white" if self.hollow else self.color}

    @property
    def line(self) -> dict[str, Any]:
        return self.point | {"linestyle": self.linestyle}


_STYLES = {
    "lora": Style(LORA, "o", _SOLID),
    "gaussian": Style(LORA, "^", _DOTTED),
    "rslora": Style(SKY, "s", _DASHED),
    "loraplus": Style(SKY, "^", _BOTH),
    "pissa": Style(PISSA, "D", _SOLID),
    "unit": Style(BLACK, "X", _SOLID),
    "dora": Style(GREEN, "v", _SOLID),
    "pissa_dora": Style(PISSA, "v", _DASHED),
    "olora": Style(PINK, "P", _SOLID),
    "adalora": Style(ORANGE, "p", _DASHED),
    "full": Style(GREY, "h", _BOTH),
    "medium": Style(GREEN, "s", _DASHED),
    "minor": Style(ORANGE, "^", _DOTTED),
    "lora_256": Style(GREEN, "v", _DOTTED),
    "pissa_64": Style(BLACK, "s", _DASHED),
    "pissa_256": Style(GREEN, "^", _DOTTED),
    "qlora": Style(LORA, "o", _SOLID, hollow=True),
    "loftq": Style(LOFTQ, "s", _DASHED, hollow=True),
    "qpissa_1": Style(QPISSA, "D", _SOLID, hollow=True),
    "qpissa_5": Style(QPISSA, "d", _DASHED, hollow=True),
    "pissa_on_nf4": Style(PISSA, "v", _DOTTED, hollow=True),
    "lora_on_1": Style(SKY, "o", _DASHED, hollow=True),
    "lora_on_5": Style(SKY, "^", _DOTTED, hollow=True),
    "unit_on_nf4": Style(BLACK, "X", _SOLID, hollow=True),
    "unit_on_1": Style(GREY, "P", _DASHED, hollow=True),
    "unit_on_5": Style(GREY, "s", _DOTTED, hollow=True),
    "repair_diagonal": Style(GREEN, "v", _DOTTED, hollow=True),
    "repair_1": Style(GREEN, "o", _SOLID, hollow=True),
    "repair_5": Style(GREEN, "^", _DASHED, hollow=True),
    "feedback": Style(PINK, "s", _SOLID, hollow=True),
    "feedback_repair": Style(PINK, "P", _DASHED, hollow=True),
    "pissa_on_repair": Style(PISSA, "^", _BOTH, hollow=True),
    "nf3": Style(ORANGE, "o", _SOLID, hollow=True),
    "nf3_repair": Style(ORANGE, "^", _DASHED, hollow=True),
    "nf3_both": Style(ORANGE, "P", _BOTH, hollow=True),
    "LoftQ, T = 1": Style(LOFTQ, "o", _DOTTED, hollow=True),
    "LoftQ, T = 5": Style(LOFTQ, "s", _DASHED, hollow=True),
    "QPiSSA, T = 1": Style(QPISSA, "D", _SOLID, hollow=True),
    "QPiSSA, T = 5": Style(QPISSA, "d", _DASHED, hollow=True),
}
_OTHERS = (
    Style(BLUE, "o", _SOLID),
    Style(RED, "D", _DASHED),
    Style(GREEN, "v", _BOTH),
    Style(BLACK, "X", _DOTTED),
    Style(ORANGE, "s", _SOLID),
    Style(PINK, "P", _DASHED),
    Style(SKY, "^", _BOTH),
    Style(GREY, "h", _DOTTED),
)


def label(name: str) -> str:
    """A method's label. Any other name is its own label."""
    return METHODS[name].label if name in METHODS else name


def style(name: str, place: int = 0) -> Style:
    """A method's style in all pictures. Any other line gets the style of its place in the picture."""
    return _STYLES.get(name) or _OTHERS[place % len(_OTHERS)]


def panels(titles: Sequence[str], columns: int | None = None, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title. Unlike pyplot's it needs no window system, and nobody else sees it.

    Args:
        columns: all side by side if not given.
        height: of a panel in inches.
    """
    columns = columns or len(titles)
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(WIDTH, 0.45 + rows * height), dpi=DPI, layout="constrained")
    axes = [figure.add_subplot(rows, columns, 1 + i) for i in range(len(titles))]
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, loc="left")
    return figure, axes


def against_rate(axes: Axes, losses: Mapping[str, Mapping[float, float]], best: Mapping[str, float | None]) -> None:
    """Loss against the rate, a line for each method; the best point is ringed. What diverged, or is far above all, is
    an arrow at the top edge."""
    finite = [loss for line in losses.values() for loss in line.values() if math.isfinite(loss)]
    if not finite:
        return
    top = min(max(finite), HEIGHTS * min(finite))
    for place, (name, line) in enumerate(losses.items()):
        look = style(name, place)
        seen = [line[rate] if line[rate] <= top else math.nan for rate in sorted(line)]  # nothing is drawn at NaN
        axes.plot(sorted(line), seen, **look.line)
        above = [rate for rate in line if line[rate] > top]
        edge = {"marker": r"$\uparrow$", "markersize": 8, "linestyle": "", "transform": axes.get_xaxis_transform()}
        axes.plot(above, [0.95] * len(above), color=look.color, **edge)
        if (rate := best.get(name)) is not None:
            axes.plot(rate, line[rate], "o", markersize=10, markerfacecolor="none", color=look.color)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    margin = 0.06 * (top - min(finite)) or 0.1
    axes.set_ylim(min(finite) - margin, top + 2 * margin)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss (nats)")


def sweeps(axes: Axes, each: Mapping[str, Sweep], known: Known) -> None:
    """Loss against the rate for the sweeps of some methods, as far as they are known."""
    against_rate(
        axes,
        {method: sweep.losses(known) for method, sweep in each.items()},
        {method: sweep.best(known) for method, sweep in each.items()},
    )


def against_steps(axes: Axes, curves: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> None:
    """Loss against steps: each method's mean over its seeds, and from the lowest to the highest of them in pale.

    Args:
        curves: of each seed [step, loss] after [step, loss], at the same steps for all seeds of a method.
    """
    for place, (name, seeds) in enumerate(curves.items()):
        look = style(name, place)
        steps = [point[0] for point in seeds[0]]
        at = [[seed[i][1] for seed in seeds] for i in range(len(steps))]
        axes.fill_between(steps, [*map(min, at)], [*map(max, at)], color=look.color, alpha=0.15, linewidth=0)
        means = [sum(losses) / len(losses) for losses in at]
        axes.plot(steps, means, **look.line)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("held-out loss (nats)")


def dot(axes: Axes, name: str, x: Spread, y: Spread) -> None:
    """A method's means of two measures, with bars of their deviations."""
    look = style(name)
    bars = {"xerr": x.deviation, "yerr": y.deviation, "elinewidth": 0.9} if x.n > 1 and y.n > 1 else {}
    axes.errorbar(x.mean, y.mean, linestyle="", **look.point, **bars)


def gaps(axes: Axes, spreads: Mapping[str, Spread | None], first: str, unit: str, named: bool = True) -> None:
    """A dot for each method, the first one on top: how much it has more than the method `first`, seed by seed, with a
    bar of two standard errors. What diverged has none.

    Args:
        named: whether the methods' names are beside it; not if a panel to the left has them.
    """
    reference = spreads[first]
    for place, (name, spread) in enumerate(spreads.items()):
        gap = spread.less(reference) if spread is not None and reference is not None else None
        if gap is not None and math.isfinite(gap.mean):
            bar = {"xerr": 2 * gap.error, "capsize": 2.5} if gap.n > 1 and name != first else {}
            axes.errorbar(gap.mean, -place, linestyle="", **style(name, place).point, **bar)
    if axes.has_data():
        axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    names = [label(name) + (f" (n = {spread.n})" if spread else " (none yet)") for name, spread in spreads.items()]
    axes.set_yticks([-place for place in range(len(spreads))], names if named else [""] * len(names))
    axes.set_ylim(-len(spreads) + 0.4, 0.6)
    axes.set_xlabel(f"{unit} less {label(first)}'s")


def lines(axes: Axes, spreads: Mapping[str, Mapping[float, Spread]]) -> None:
    """Means against numbers, such as ranks, a line for each method; bars are the deviations of the seeds."""
    for place, (name, line) in enumerate(spreads.items()):
        look = style(name, place)
        means = [spread.mean for spread in line.values()]
        axes.plot(list(line), means, **look.line)
        for x, spread in line.items():
            if spread.n > 1:
                axes.errorbar(x, spread.mean, spread.deviation, color=look.color, capsize=2.5)


def doubling(axes: Axes, ranks: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each rank."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_xlabel("rank")


def legend(figure: Figure, names: Sequence[str], note: str = "", columns: int = 4) -> None:
    """One legend for all panels, below them, where it covers nothing. `note` gives n and explains the bars."""
    looks = [style(name, place) for place, name in enumerate(names)]
    handles = [
        mpl.lines.Line2D([], [], label=label(name), **look.line) for name, look in zip(names, looks, strict=True)
    ]
    drawn = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(columns, len(names)),
        frameon=False,
        title=note,
        title_fontsize=8,
    )
    drawn.get_title().set_multialignment("center")


def note(figure: Figure, text: str) -> None:
    """A line below all panels of a figure that has no legend."""
    figure.supxlabel(text, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG with a palette, without a date or a program's version in it. Panels without data say so."""
    for axes in figure.axes:
        if not axes.has_data():
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no results yet", transform=axes.transAxes, ha="center", va="center")
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)

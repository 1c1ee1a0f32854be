"""Draws the pictures of README.md from bench/results/experiments: `python -m bench.experiments.figures`.

The same numbers give the same bytes. Pictures are as wide as a page's text, with letters of 8 points. Those of the
studies at the end of the page are as their own programs drew them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from io import BytesIO
from itertools import pairwise, product, takewhile
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

from bench.pictures import LORA, PISSA, QPISSA

Result = dict[str, Any]

HERE = Path(__file__).parent
DATA = HERE.parent / "results" / "experiments"

# ---- The results -----------------------------------------------------------------------------------------------------

ENCODED = ("films", "products")
NAMES = {"gsm8k": "GSM8K", "gsm8k_24": "GSM8K, 24 steps"} | {name: name for name in ("sums", *ENCODED)}
TASKS = {task: f"{'MiniLM' if task in ENCODED else 'SmolLM2'} on {name}" for task, name in NAMES.items()}
TOLERANCE = 0.02  # of a valley: a loss so near to the best one, by ratio, is in it


@cache
def results(kind: str) -> dict[tuple[Any, ...], Result]:
    """The results of a file by the values of their cells, in the order of their fields' names."""
    lines = [json.loads(line) for line in (DATA / f"{kind}.jsonl").read_text().splitlines()]
    return {tuple(cell[name] for name in sorted(cell)): line["result"] for line in lines for cell in [line["cell"]]}


def loss_of(result: Result) -> float:
    """The held-out loss after training; infinite, None in the files, where training diverged."""
    loss = result["after"]["loss"]
    return math.inf if loss is None else float(loss)


def accuracy(result: Result) -> float:
    """The accuracy in percent."""
    return 100 * float(result["after"]["accuracy"])


def forgotten(result: Result) -> float:
    """The increase of the loss on prose."""
    before, after = (result[when]["unrelated"] for when in ("before", "after"))
    return math.inf if after is None else float(after - before)


class Spread(NamedTuple):
    """A measure with several seeds, in their order."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds (n - 1). NaN for one seed, and if one of them diverged."""
        return stdev(self.values) if self.n > 1 and math.isfinite(self.mean) else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.deviation / math.sqrt(self.n)

    def less(self, other: Spread) -> Spread:
        """The differences, seed by seed: what a seed's order of the data changes for all methods is not in them."""
        return Spread(tuple(one - two for one, two in zip(self.values, other.values, strict=False)))


class Sweep(NamedTuple):
    """The trainings of a method on a task at one rank, over rates and seeds."""

    task: str
    method: str
    r: int = 16
    first: int = 0
    """The seed of the sweep, which chooses the best rate."""

    def at(self, rate: float, seed: int) -> Result | None:
        if self.task in ENCODED:
            return results("encoder").get((self.method, self.r, rate, seed, "auto", self.task))
        return results("language").get((self.method, self.r, rate, seed, self.task))

    @property
    def over_rates(self) -> dict[float, Result]:
        """The results of the first seed by rate, ascending."""
        known = results("encoder" if self.task in ENCODED else "language")
        rates = sorted({key[2] for key in known if (*key[:2], key[-1]) == (self.method, self.r, self.task)})
        found = {rate: self.at(rate, self.first) for rate in rates}
        return {rate: result for rate, result in found.items() if result is not None}

    @property
    def losses(self) -> dict[float, float]:
        return {rate: loss_of(result) for rate, result in self.over_rates.items()}

    @property
    def best(self) -> float:
        """The rate of the least loss."""
        losses = self.losses
        return min(losses, key=lambda rate: losses[rate])

    def seeds(self, *seeds: int, rate: float | None = None) -> list[Result]:
        """The results of some seeds at the best rate, or another, up to the first seed that is not known."""
        found = (self.at(rate or self.best, seed) for seed in seeds)
        return [result for result in takewhile(lambda result: result is not None, found) if result is not None]

    def spread(self, measure: Callable[[Result], float] = loss_of) -> Spread:
        """A measure at the best rate, over seeds."""
        return Spread(tuple(map(measure, self.seeds(0, 1, 2))))

    @property
    def width(self) -> float:
        """Decades between the rates with a loss within TOLERANCE of the best. Between points the loss is interpolated
        over the rate's logarithm."""
        losses, rates = self.losses, list(self.losses)
        allowed, index = losses[self.best] * (1 + TOLERANCE), rates.index(self.best)
        return _crossing(rates[index:], losses, allowed) - _crossing(rates[index::-1], losses, allowed)


def _crossing(rates: list[float], losses: dict[float, float], allowed: float) -> float:
    """log10 of the rate at which the loss first exceeds what is allowed, going along `rates`; of the last one if it
    never does."""
    for near, far in pairwise(rates):
        if losses[far] > allowed:
            share = (allowed - losses[near]) / (losses[far] - losses[near])
            return math.log10(near) + share * math.log10(far / near)
    return math.log10(rates[-1])


def sweeps(task: str, methods: Iterable[str], r: int = 16) -> dict[str, Sweep]:
    return {method: Sweep(task, method, r) for method in methods}


# ---- How pictures look -----------------------------------------------------------------------------------------------

# The rest of Okabe and Ito's colours. Their yellow is too pale for print.
SKY, GREEN, ORANGE = "#56B4E9", "#009E73", "#E69F00"
BLACK, GREY = "#000000", "#777777"

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
    """The name and the look of a line. In grey, marker and line style distinguish it from others."""

    label: str
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
    "lora": Style("LoRA", LORA, "o", _SOLID),
    "gaussian": Style("LoRA, Gaussian", LORA, "^", _DOTTED),
    "rslora": Style("rsLoRA", SKY, "s", _DASHED),
    "loraplus": Style("LoRA+", SKY, "^", _BOTH),
    "pissa": Style("PiSSA", PISSA, "D", _SOLID),
    "unit": Style("orthonormal start", BLACK, "X", _SOLID),
    "dora": Style("DoRA", GREEN, "v", _SOLID),
    "pissa_dora": Style("PiSSA + DoRA", PISSA, "v", _DASHED),
    "olora": Style("OLoRA", QPISSA, "P", _SOLID),
    "adalora": Style("AdaLoRA", ORANGE, "p", _DASHED),
    "full": Style("full", GREY, "h", _BOTH),
    "medium": Style("medium components", GREEN, "s", _DASHED),
    "minor": Style("minor components", ORANGE, "^", _DOTTED),
    "lora_256": Style("LoRA, alpha 256", GREEN, "v", _DOTTED),
    "pissa_64": Style("PiSSA, alpha 64", BLACK, "s", _DASHED),
    "pissa_256": Style("PiSSA, alpha 256", GREEN, "^", _DOTTED),
    "qlora": Style("QLoRA", LORA, "o", _SOLID, hollow=True),
    "loftq": Style("LoftQ, T = 5", GREEN, "s", _DASHED, hollow=True),
    "qpissa_1": Style("QPiSSA, T = 1", QPISSA, "D", _SOLID, hollow=True),
    "qpissa_5": Style("QPiSSA, T = 5", QPISSA, "d", _DASHED, hollow=True),
    "pissa_on_nf4": Style("PiSSA's start on nf4(W)", PISSA, "v", _DOTTED, hollow=True),
    "lora_on_1": Style("LoRA's start on T = 1", SKY, "o", _DASHED, hollow=True),
    "lora_on_5": Style("LoRA's start on T = 5", SKY, "^", _DOTTED, hollow=True),
    "unit_on_nf4": Style("orthonormal start on nf4(W)", BLACK, "X", _SOLID, hollow=True),
    "unit_on_1": Style("orthonormal start on T = 1", GREY, "P", _DASHED, hollow=True),
    "unit_on_5": Style("orthonormal start on T = 5", GREY, "s", _DOTTED, hollow=True),
    "repair_diagonal": Style("diagonal repair", GREEN, "v", _DOTTED, hollow=True),
    "repair_1": Style("repair, T = 1", GREEN, "o", _SOLID, hollow=True),
    "repair_5": Style("repair, T = 5", GREEN, "^", _DASHED, hollow=True),
    "feedback": Style("error feedback", QPISSA, "s", _SOLID, hollow=True),
    "feedback_repair": Style("error feedback and repair", QPISSA, "P", _DASHED, hollow=True),
    "pissa_on_repair": Style("PiSSA's start, repair", PISSA, "^", _BOTH, hollow=True),
    "nf3": Style("nf3(W)", ORANGE, "o", _SOLID, hollow=True),
    "nf3_repair": Style("nf3, repair", ORANGE, "^", _DASHED, hollow=True),
    "nf3_both": Style("nf3, both", ORANGE, "P", _BOTH, hollow=True),
    "LoftQ, T = 1": Style("LoftQ, T = 1", GREEN, "o", _DOTTED, hollow=True),
    "LoftQ, T = 5": Style("LoftQ, T = 5", GREEN, "s", _DASHED, hollow=True),
    "QPiSSA, T = 1": Style("QPiSSA, T = 1", QPISSA, "D", _SOLID, hollow=True),
    "QPiSSA, T = 5": Style("QPiSSA, T = 5", QPISSA, "d", _DASHED, hollow=True),
}
_OTHERS = (
    (LORA, "o", _SOLID),
    (PISSA, "D", _DASHED),
    (GREEN, "v", _BOTH),
    (BLACK, "X", _DOTTED),
    (ORANGE, "s", _SOLID),
    (QPISSA, "P", _DASHED),
    (SKY, "^", _BOTH),
    (GREY, "h", _DOTTED),
)


def style(name: str, place: int = 0) -> Style:
    """A method's style in all pictures. Any other line is its own label, in the style of its place in the picture."""
    return _STYLES.get(name) or Style(name, *_OTHERS[place % len(_OTHERS)])


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


def legend(figure: Figure, names: Iterable[str], note: str = "", columns: int = 4) -> None:
    """One legend for all panels, below them, where it covers nothing. `note` gives n and explains the bars."""
    looks = [style(name, place) for place, name in enumerate(names)]
    handles = [mpl.lines.Line2D([], [], label=look.label, **look.line) for look in looks]
    drawn = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(columns, len(looks)),
        frameon=False,
        title=note,
        title_fontsize=8,
    )
    drawn.get_title().set_multialignment("center")


def note(figure: Figure, text: str) -> None:
    """A line below all panels of a figure that has no legend."""
    figure.supxlabel(text, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG with a palette, without a date or a program's version in it."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)


# ---- Kinds of panels -------------------------------------------------------------------------------------------------


def against_rate(axes: Axes, lines: Mapping[str, Mapping[float, float]]) -> None:
    """Loss against the rate, a line for each method; the best point is ringed. What diverged, or is far above all, is
    an arrow at the top edge."""
    finite = [loss for line in lines.values() for loss in line.values() if math.isfinite(loss)]
    top = min(max(finite), HEIGHTS * min(finite))
    for place, (name, line) in enumerate(lines.items()):
        look = style(name, place)
        seen = [loss if loss <= top else math.nan for loss in line.values()]  # nothing is drawn at NaN
        axes.plot(list(line), seen, **look.line)
        above = [rate for rate in line if line[rate] > top]
        edge = {"marker": r"$\uparrow$", "markersize": 8, "linestyle": "", "transform": axes.get_xaxis_transform()}
        axes.plot(above, [0.95] * len(above), color=look.color, **edge)
        best = min(line, key=lambda rate: line[rate])
        axes.plot(best, line[best], "o", markersize=10, markerfacecolor="none", color=look.color)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    margin = 0.06 * (top - min(finite)) or 0.1
    axes.set_ylim(min(finite) - margin, top + 2 * margin)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss (nats)")


def of_sweeps(axes: Axes, each: Mapping[str, Sweep]) -> None:
    against_rate(axes, {method: sweep.losses for method, sweep in each.items()})


def gaps(axes: Axes, spreads: Mapping[str, Spread | None], first: str, unit: str, named: bool = True) -> None:
    """A dot for each method, the first one on top: how much it has more than the method `first`, seed by seed, with a
    bar of two standard errors. What diverged has none.

    Args:
        named: whether the methods' names are beside it; not if a panel to the left has them.
    """
    reference = spreads[first]
    assert reference is not None
    for place, (name, spread) in enumerate(spreads.items()):
        gap = None if spread is None else spread.less(reference)
        if gap is not None and math.isfinite(gap.mean):
            bar = {"xerr": 2 * gap.error, "capsize": 2.5} if gap.n > 1 and name != first else {}
            axes.errorbar(gap.mean, -place, linestyle="", **style(name, place).point, **bar)
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    names = [style(name).label + (f" (n = {spread.n})" if spread else "") for name, spread in spreads.items()]
    axes.set_yticks([-place for place in range(len(spreads))], names if named else [""] * len(names))
    axes.set_ylim(-len(spreads) + 0.4, 0.6)
    axes.set_xlabel(f"{unit} less {style(first).label}'s")


def of_ranks(axes: Axes, lines: Mapping[str, Mapping[int, float]], ranks: Sequence[int]) -> None:
    """Values against the rank, on a logarithmic axis with a tick at each."""
    for place, (name, line) in enumerate(lines.items()):
        axes.plot(list(line), list(line.values()), **style(name, place).line)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_xlabel("rank")


# ---- Pictures --------------------------------------------------------------------------------------------------------

DENSE = ("lora", "rslora", "pissa", "unit", "dora", "olora", "pissa_dora", "adalora", "loraplus", "full")
FOUR_BIT = ("qlora", "loftq", "qpissa_1", "qpissa_5")
STARTS = ("lora", "rslora", "pissa", "unit", "olora")
RANKS = (4, 16, 64)


def methods_rates() -> Figure:
    parts = [("gsm8k", "dense base", DENSE), ("gsm8k", "base in 4 bits", FOUR_BIT), ("sums", "dense base", DENSE)]
    figure, axes = panels([f"{TASKS[task]}, {base}" for task, base, _ in parts], columns=2)
    for one, (task, _, methods) in zip(axes, parts, strict=True):
        of_sweeps(one, sweeps(task, methods))
    legend(figure, (*DENSE, *FOUR_BIT), SWEEP_NOTE)
    return figure


def methods_best() -> Figure:
    figure, axes = panels(("SmolLM2 on GSM8K: loss", "sums: loss", "sums: accuracy"), height=2.9)
    gaps(axes[0], {m: s.spread() for m, s in sweeps("gsm8k", (*DENSE, *FOUR_BIT)).items()}, "lora", "loss")
    for one, measure, unit in ((axes[1], loss_of, "loss"), (axes[2], accuracy, "points")):
        # A line for each method of the first panel, for the names are there.
        known = {method: sweep.spread(measure) for method, sweep in sweeps("sums", DENSE).items()}
        gaps(one, known | dict.fromkeys(FOUR_BIT), "lora", unit, named=False)
    note(figure, GAP_NOTE)
    return figure


def equal_rates() -> Figure:
    """PiSSA's loss less LoRA's: a bar for each rate that both have, and one for the best of each."""
    tasks = ("gsm8k", "sums", "films")
    figure, axes = panels([TASKS[task] for task in tasks])
    for one, task in zip(axes, tasks, strict=True):
        lora, pissa = Sweep(task, "lora"), Sweep(task, "pissa")
        pairs = {
            f"{rate:.0e}".replace("e-0", "e-"): Spread((pissa.losses[rate] - loss,))
            for rate, loss in lora.losses.items()
            if rate in pissa.losses
        }
        for name, gap in (pairs | {"best": pissa.spread().less(lora.spread())}).items():
            error = 2 * gap.error if gap.n > 1 else None
            look = {"color": PISSA, "edgecolor": "white", "hatch": "///" if name == "best" else "", "alpha": 0.8}
            one.bar(name, gap.mean, yerr=error, capsize=3, **look)
        one.axhline(0, color="black", linewidth=0.8)
        one.set_xlabel("learning rate of both")
        one.set_ylabel("loss: PiSSA less LoRA (nats)")
    note(
        figure, "below 0: PiSSA is better; equal rates: n = 1; best: each at its own, over seeds, ± two standard errors"
    )
    return figure


def few_steps() -> Figure:
    """Loss against steps: each method's mean over its seeds, and from the lowest to the highest of them in pale."""
    figure, (axes,) = panels([f"{TASKS['gsm8k']}, dense base, rank 16"], height=3.4)
    for method, sweep in sweeps("gsm8k", DENSE).items():
        found = sweep.seeds(1, 2)
        # Without the loss before training, which is so far above that the lines could not be told apart.
        curves = [dict(result["curve"]) | {result["steps"]: loss_of(result)} for result in found]
        steps = list(curves[0])
        at = [[curve[step] for curve in curves] for step in steps]
        look = style(method)
        axes.fill_between(steps, [*map(min, at)], [*map(max, at)], color=look.color, alpha=0.15, linewidth=0)
        axes.plot(steps, [sum(losses) / len(losses) for losses in at], **look.line)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("held-out loss (nats)")
    legend(figure, DENSE, "means of n = 2 seeds, pale: from the least to the largest; each method at its best rate")
    return figure


def _start_groups() -> dict[tuple[str, int], tuple[str, ...]]:
    """The methods of `start_norm` at a task and a rank."""
    three = ("lora", "pissa", "unit")
    language = {("gsm8k", r): STARTS if r == 16 else three for r in RANKS}
    return {**language, **{("films", r): STARTS for r in RANKS}, ("sums", 16): STARTS}


def start_norm_rates() -> Figure:
    groups = _start_groups()
    figure, axes = panels([f"{NAMES[task]}, rank {r}" for task, r in groups], columns=3, height=2.0)
    for one, ((task, r), methods) in zip(axes, groups.items(), strict=True):
        of_sweeps(one, sweeps(task, methods, r))
    legend(figure, STARTS, f"GSM8K and sums: SmolLM2; films: MiniLM\n{SWEEP_NOTE}", columns=5)
    return figure


def start_norm_widths() -> Figure:
    groups, tasks = _start_groups(), ("gsm8k", "films")
    figure, axes = panels([TASKS[task] for task in tasks], height=2.2)
    for one, task in zip(axes, tasks, strict=True):
        ranks = {method: [r for r in RANKS if method in groups[task, r]] for method in STARTS}
        of_ranks(one, {m: {r: Sweep(task, m, r).width for r in those} for m, those in ranks.items()}, RANKS)
        one.set_ylim(bottom=0)
        one.set_ylabel("width of the valley (decades)")
    legend(figure, STARTS, "n = 1 seed; decades of the rate with a loss within 2 % of the best", columns=5)
    return figure


def alpha() -> Figure:
    """A rate at s = alpha / r does for PiSSA what the √s-fold rate does at s = 1."""
    scalings = {"pissa": 1, "pissa_64": 4, "pissa_256": 16}
    lora = sweeps("gsm8k", ("lora", "rslora", "lora_256", "loraplus"))
    figure, axes = panels(["LoRA", "PiSSA"], height=2.6)
    of_sweeps(axes[0], lora)
    scaled = {
        method: {float(f"{rate * math.sqrt(s):.2g}"): loss for rate, loss in Sweep("gsm8k", method).losses.items()}
        for method, s in scalings.items()
    }
    against_rate(axes[1], scaled)
    axes[1].set_xlabel("√s times the learning rate")
    legend(figure, (*lora, *scalings), f"{TASKS['gsm8k']}; {SWEEP_NOTE}")
    return figure


def any_start() -> Figure:
    bases = (("qlora", "pissa_on_nf4", "unit_on_nf4"), *((f"lora_on_{t}", f"qpissa_{t}", f"unit_on_{t}") for t in "15"))
    figure, (axes,) = panels([f"{TASKS['gsm8k']}, base in 4 bits, rank 16"], height=2.6)
    methods = [method for methods in bases for method in methods]
    gaps(axes, {m: s.spread() for m, s in sweeps("gsm8k", (*methods, "loftq")).items()}, "qlora", "loss")
    note(figure, GAP_NOTE)
    return figure


REPAIRS = ("repair_diagonal", "repair_1", "repair_5", "feedback", "feedback_repair", "pissa_on_repair")


def repairs() -> Figure:
    known = ("lora", "qlora", "loftq", "qpissa_1", "qpissa_5", "lora_on_1", "lora_on_5")
    figure, (axes,) = panels([f"{TASKS['gsm8k']}, rank 16"], height=3.6)
    methods = (*known, *REPAIRS, "nf3", "nf3_repair", "nf3_both")
    gaps(axes, {method: sweep.spread() for method, sweep in sweeps("gsm8k", methods).items()}, "lora", "loss")
    note(figure, GAP_NOTE)
    return figure


def repairs_bits() -> Figure:
    """The losses of each kind of base, side by side for each format; a line at LoRA's on the dense model."""
    kinds = {
        "plain": {"nf4": "qlora", "nf3": "nf3"},
        "error feedback": {"nf4": "feedback"},
        "repair": {"nf4": "repair_1", "nf3": "nf3_repair"},
        "both": {"nf4": "feedback_repair", "nf3": "nf3_both"},
    }
    bits = {"nf4": 4.13, "nf3": 3.13}  # of a weight, with its share of the scales

    def before(sweep: Sweep) -> float:  # of seeds above 0; no seed changes it
        return float(sweep.seeds(1)[0]["before"]["loss"])

    def after(sweep: Sweep) -> float:
        return sweep.spread().mean

    figure, axes = panels(["before training", "after training"])
    for one, loss in zip(axes, (before, after), strict=True):
        for place, by_format in enumerate(kinds.values()):
            for x, name in enumerate(bits):
                if name in by_format:
                    y = loss(Sweep("gsm8k", by_format[name]))
                    one.plot(x + 0.16 * (place - 1.5), y, linestyle="", markersize=7, **style("", place).point)
        one.axhline(loss(Sweep("gsm8k", "lora")), color="black", linewidth=0.8, zorder=0)
        one.set_xticks(range(len(bits)), [f"{name}, {size} bits" for name, size in bits.items()])
        one.set_xlim(-0.5, len(bits) - 0.5)
        one.set_ylabel("held-out loss (nats)")
    legend(figure, kinds, "the line: LoRA on the dense model, n = 3 seeds; each at its best rate")
    return figure


def nlu() -> Figure:
    methods = ("full", "gaussian", "lora", "dora", "adalora", "pissa", "unit")
    parts = list(product(ENCODED, (("loss", "loss", loss_of), ("accuracy", "accuracy (points)", accuracy))))
    figure, axes = panels([f"{TASKS[task]}: {what}" for task, (what, *_) in parts], columns=2, height=2.3)
    for one, (task, (what, unit, measure)) in zip(axes, parts, strict=True):
        known = {method: sweep.spread(measure) for method, sweep in sweeps(task, methods).items()}
        gaps(one, known, "lora", unit, named=what == "loss")
    note(figure, GAP_NOTE)
    return figure


def ranks() -> Figure:
    all_ranks, methods = (1, 4, 16, 64, 128), ("lora", "pissa")
    figure, (axes,) = panels([TASKS["films"]], height=2.4)
    least = {method: {r: min(Sweep("films", method, r).losses.values()) for r in all_ranks} for method in methods}
    of_ranks(axes, least, all_ranks)
    axes.set_ylabel("held-out loss (nats)")
    legend(figure, methods, "n = 1 seed; each at its best rate")
    return figure


def components() -> Figure:
    each = sweeps("films", ("pissa", "medium", "minor"))
    figure, (axes,) = panels([f"{TASKS['films']}, rank 16"], height=2.2)
    of_sweeps(axes, each)
    legend(figure, each, SWEEP_NOTE)
    return figure


_ATTENTION = ("query", "key", "value", "attention.output.dense")
_PARTS = {
    "minilm": (*_ATTENTION, "intermediate.dense", "output.dense"),
    "smollm2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
_WEIGHTS = {
    "minilm": "MiniLM",
    "smollm2": "SmolLM2",
    "gaussian": "Gaussian",
    "power law 0.45": "σᵢ = i^-0.45",
    "power law 1": "σᵢ = 1 / i",
}


def _removed(source: str, parts: Iterable[str], r: int, method: str) -> float:
    """The share of nf4's error that a method removes (arXiv 2404.02948, eq. 6 to 8), the mean over parts, %."""
    shares = []
    for part in parts:
        norms = results("quant_error")["nf4", part, r, source]["nuclear_norms"]
        kept = [1 - norm / plain for norm, plain in zip(norms[method], norms["plain"], strict=True)]
        shares.append(float(sum(kept) / len(kept)))
    return 100 * mean(shares)


def quant_errors() -> Figure:
    figure, (removal, gap) = panels(["MiniLM's attention, nf4", "T = 1, nf4: QPiSSA less LoftQ"])
    all_ranks, some = (1, 2, 4, 8, 16, 32, 64, 128), (16, 64, 128)
    methods = [f"{name}, T = {t}" for t in (1, 5) for name in ("LoftQ", "QPiSSA")]
    removed = {method: {r: _removed("minilm", _ATTENTION, r, method) for r in all_ranks} for method in methods}
    of_ranks(removal, removed, all_ranks)
    removal.set_ylabel("error removed (%)")
    less = {}
    for source, name in _WEIGHTS.items():
        parts = _PARTS.get(source, ("",))
        both = [{r: _removed(source, parts, r, f"{method}, T = 1") for r in some} for method in ("QPiSSA", "LoftQ")]
        less[name] = {r: both[0][r] - both[1][r] for r in some}
    of_ranks(gap, less, some)
    gap.axhline(0, color="black", linewidth=0.8)
    gap.set_ylabel("error removed (percentage points)")
    for axes, lines in ((removal, removed), (gap, less)):
        for place, name in enumerate(lines):
            axes.plot([], [], label=name, **style(name, place).line)
    removal.legend(frameon=False)
    gap.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.57))  # between the lines
    note(figure, "means of n weights: left 12, right 18 of MiniLM, 21 of SmolLM2 and 1 of each other")
    return figure


def fast_svd() -> Figure:
    weights = {"minilm": "MiniLM, 36 weights", "spikes": "one of 2048²"}
    passes, roundoff = (2, 4, 8, 16), 1e-9  # float32's: what is lost below it
    lines = list(product((4, 64), ("pissa", "torch")))
    figure, each = panels([f"{name}, one thread" for name in weights.values()])
    names = [f"{code}, rank {r}" for r, code in lines]
    for axes, source in zip(each, weights, strict=True):
        for place, (r, code) in enumerate(lines):
            found = [results("svd")[code, count, r, source] for count in passes]
            milliseconds = [1e3 * result["seconds"]["decomposition"] for result in found]
            lost = [max(result["energy_lost"], roundoff) for result in found]
            axes.plot(milliseconds, lost, **style(names[place], place).line)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("processor time (ms)")
        axes.set_ylabel("energy lost (share)")
    legend(figure, names, "2, 4, 8, 16 passes from left to right; n = 5 timings: median", columns=3)
    return figure


_PROSE = "held-out loss on the task (nats)", "increase on prose (nats)"


def forgetting() -> Figure:
    figure, axes = panels([TASKS[task] for task in ("gsm8k", "sums")], height=2.6)
    # The medium and the minor components at the rate at which seed 3 ends with the loss of PiSSA's best one.
    others = {Sweep("gsm8k", method): 5e-4 for method in ("medium", "minor")}
    for one, task in zip(axes, ("gsm8k", "sums"), strict=True):
        methods = (*DENSE, *FOUR_BIT) if task == "gsm8k" else DENSE
        at = {sweep: sweep.best for sweep in sweeps(task, methods).values()} | (others if task == "gsm8k" else {})
        for sweep, rate in at.items():
            found = sweep.seeds(1, 2, 3, rate=rate)
            x, y = (Spread(tuple(map(measure, found))) for measure in (loss_of, forgotten))
            bars = {"xerr": x.deviation, "yerr": y.deviation, "elinewidth": 0.9} if x.n > 1 and y.n > 1 else {}
            one.errorbar(x.mean, y.mean, linestyle="", **style(sweep.method).point, **bars)
        one.set(xlabel=_PROSE[0], ylabel=_PROSE[1])
    names = (*DENSE, *FOUR_BIT, "medium", "minor")
    legend(figure, names, "n = 2 or 3 seeds, bars: their deviation; each method at its best rate")
    return figure


def forgetting_rates() -> Figure:
    methods = ("lora", "pissa", "medium", "minor", "full", "rslora")
    over_rates = {method: Sweep("gsm8k", method, first=3).over_rates for method in methods}
    target = max(min(map(loss_of, line.values())) for line in over_rates.values())  # which all reach
    figure, (axes,) = panels([f"{TASKS['gsm8k']}, dense base, rank 16"], height=3.4)
    for method, line in over_rates.items():
        seen = [result for result in line.values() if loss_of(result) <= HEIGHTS * target]
        axes.plot([loss_of(result) for result in seen], [forgotten(result) for result in seen], **style(method).line)
    axes.set(xlabel=_PROSE[0], ylabel=_PROSE[1])
    legend(figure, methods, "n = 1 seed; each line joins the rates of a sweep", columns=3)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    draw.__name__.replace("_", "-"): draw
    for draw in (
        *(methods_rates, methods_best, equal_rates, few_steps, start_norm_rates, start_norm_widths, alpha, any_start),
        *(repairs, repairs_bits, nlu, ranks, components, quant_errors, fast_svd, forgetting, forgetting_rates),
    )
}


def main() -> None:
    for name, draw in PICTURES.items():
        save(draw(), HERE / "pictures" / f"{name}.png")


if __name__ == "__main__":
    main()

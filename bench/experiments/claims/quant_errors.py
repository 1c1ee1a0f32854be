"""Tables 4, 8 and 9, figures 7 and 16: the error of a base in 4 or 8 bits, and what LoftQ and QPiSSA remove of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product
from statistics import mean

from bench.experiments import figures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.quant_error import MADE, METHODS, PARTS, QuantErrorCell, removed
from bench.experiments.sweep import spread

FORMATS = ("nf4", "int8")
RANKS = (16, 64, 128)
ALL_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
ATTENTION = PARTS["minilm"][:4]
SHOWN = 64
"""The rank of the table of layer types."""
SIZES = {
    "minilm": "MiniLM, 384 to 1536",
    "smollm2": "SmolLM2, 192 to 1536",
    "gaussian": "Gaussian, 512²",
    "power law 0.45": "σᵢ = i^-0.45, 512²",
    "power law 1": "σᵢ = 1 / i, 512²",
}
COLUMNS = {"Q": 0, "K": 1, "V": 2, "O": 3, "gate": None, "up": 4, "down": 5}
"""MiniLM's parts under the names of SmolLM2's."""

# Table 4: mean over layer types. LoftQ and QPiSSA with T = 1, then with T = 5.
_PAPER = {
    "the paper: LLaMA-2-7B, 4096 to 11008": {128: (6.6, 10.7, 14.6, 19.4)},
    "the paper: LLaMA-3-8B, 1024 to 14336": {64: (5.3, 7.7, 11.2, 14.3), 128: (10.0, 11.8, 18.1, 22.9)},
}
# Table 8: LLaMA-3-8B, rank 64.
_PAPER_PARTS = {
    "LoftQ, T = 1": (4.3, 11.0, 9.9, 3.9, 2.7, 2.5, 2.6),
    "QPiSSA, T = 1": (11.3, 16.4, 8.8, 6.3, 4.5, 2.9, 3.3),
    "LoftQ, T = 5": (10.1, 18.8, 18.2, 9.9, 7.1, 7.1, 7.1),
    "QPiSSA, T = 5": (17.1, 27.3, 19.5, 12.1, 8.9, 7.2, 7.6),
}


def cells(source: str, format: str, r: int) -> list[QuantErrorCell]:
    """Those of all layer types of a source."""
    return [QuantErrorCell(source, part, format, r) for part in PARTS.get(source, ("",))]


def _ranks(options: Options) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Ranks of all weights, ranks of MiniLM's attention, and the one that is shown by layer type."""
    return ((4,), (2, 4), 4) if options.quick else (RANKS, ALL_RANKS, SHOWN)


def _attention(r: int) -> list[QuantErrorCell]:
    return [QuantErrorCell("minilm", part, "nf4", r) for part in ATTENTION]


class QuantErrors(Experiment):
    name = "quant-errors"
    title = "What LoftQ and QPiSSA remove of a quantised base's error"
    claim = (
        "tables 4 and 8: QPiSSA removes more of nf4's error than LoftQ, on average over the layers; table 9: of int8's "
        "18%"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        ranks, all_ranks, _ = _ranks(options)
        found = [cell for s in (*PARTS, *MADE) for f in FORMATS for r in ranks for cell in cells(s, f, r)]
        return [*found, *(cell for r in all_ranks for cell in _attention(r))]

    def section(self, known: Known, options: Options) -> Section:
        ranks, all_ranks, shown = _ranks(options)
        averages = [
            [
                SIZES[source],
                str(r),
                *(_percent(cells(source, f, r), method, known) for f in FORMATS for method in METHODS),
            ]
            for source in SIZES
            for r in ranks
        ]
        paper = [
            [model, str(r), *(tables.number(value, 1) for value in row), *[""] * len(METHODS)]
            for model, by_rank in _PAPER.items()
            for r, row in by_rank.items()
        ]
        head = ["weights, sides", "rank", *(f"{format}: {method}" for format in FORMATS for method in METHODS)]
        parts = [
            "% of the nuclear norm of W - nf4(W) or W - int8(W) that is removed: mean over layer types, of each "
            "the first, a middle and the last layer. nf4 has blocks of 64 and nested scales, int8 a scale for a row. "
            "SmolLM2's packaged weights lie on a 4-bit grid (Q4_1), which the authors' weights do not: its nf4 error "
            "is not theirs. What a rank removes depends on its share of the smaller side.",
            tables.table(head, [*averages, *paper]),
            f"By layer type, nf4, rank {shown}:",
            tables.table(["weights", "method", *COLUMNS], _by_part(shown, known)),
            _meaning(ranks, known),
        ]
        return Section("\n\n".join(parts), {"quant-errors.png": _picture(ranks, all_ranks, known)})


def _share(chosen: Iterable[QuantErrorCell], method: str, known: Known) -> float | None:
    """The mean over cells, %; None if one is missing."""
    chosen = list(chosen)
    if any(cell not in known for cell in chosen):
        return None
    return 100 * mean(removed(known[cell], method) for cell in chosen)


def _percent(chosen: Iterable[QuantErrorCell], method: str, known: Known) -> str:
    return tables.number(_share(chosen, method, known), 1)


def _by_part(r: int, known: Known) -> list[list[str]]:
    rows = []
    for source in PARTS:
        places = COLUMNS.values() if source == "minilm" else range(len(COLUMNS))
        each = cells(source, "nf4", r)
        for method in METHODS:
            row = ["" if place is None else _percent([each[place]], method, known) for place in places]
            rows.append([_name(source), method, *row])
    paper = "the paper: LLaMA-3-8B, rank 64"
    return [*rows, *([paper, name, *(tables.number(v, 1) for v in row)] for name, row in _PAPER_PARTS.items())]


def _meaning(ranks: Iterable[int], known: Known) -> str:
    """Where LoftQ removes more than QPiSSA, counted over weights, formats and ranks."""
    found = []
    for t in (1, 5):
        rows, better = 0, Counter[str]()
        for source, format, r in product(SIZES, FORMATS, ranks):
            loftq, qpissa = (
                _share(cells(source, format, r), f"{name}, T = {t}", known) for name in ("LoftQ", "QPiSSA")
            )
            if loftq is not None and qpissa is not None:
                rows += 1
                better.update([_name(source)] if loftq > qpissa else [])
        exceptions = ", ".join(f"{name} ({count})" for name, count in better.items())
        found.append(
            f"With T = {t} QPiSSA removes more than LoftQ in {rows - better.total()} of {rows} comparisons"
            f"{f'; LoftQ removes more on {exceptions}' if exceptions else ''}."
        )
    return " ".join(found)


def _name(source: str) -> str:
    return SIZES[source].partition(",")[0]


def _picture(ranks: Iterable[int], all_ranks: Iterable[int], known: Known) -> figures.Figure:
    figure, (removal, gap) = figures.panels(["MiniLM's attention, nf4", "T = 1, nf4: QPiSSA less LoftQ"])
    ranks, all_ranks = list(ranks), list(all_ranks)
    _lines(removal, {method: {r: _share(_attention(r), method, known) for r in all_ranks} for method in METHODS})
    figures.doubling(removal, all_ranks)
    removal.set_ylabel("error removed (%)")
    removal.legend(frameon=False)
    gaps = {}
    for source in SIZES:
        one, other = (
            {r: _share(cells(source, "nf4", r), f"{name}, T = 1", known) for r in ranks} for name in ("QPiSSA", "LoftQ")
        )
        gaps[_name(source)] = {r: _less(one[r], other[r]) for r in ranks}
    _lines(gap, gaps)
    figures.doubling(gap, ranks)
    gap.axhline(0, color="black", linewidth=0.8)
    gap.set_ylabel("error removed (percentage points)")
    gap.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.57))  # between the lines
    figures.note(figure, "means of n weights: left 12, right 18 of MiniLM, 21 of SmolLM2 and 1 of each other")
    return figure


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _lines(axes: figures.Axes, values: dict[str, dict[int, float | None]]) -> None:
    known = {name: {r: spread([v]) for r, v in line.items() if v is not None} for name, line in values.items()}
    figures.lines(axes, known)
    for place, name in enumerate(known):
        axes.plot([], [], label=name, **figures.style(name, place).line)

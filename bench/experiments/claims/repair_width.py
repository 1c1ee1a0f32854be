"""The value of a repair of fixed rank in wider layers, so that nobody has to extrapolate from a small model."""

from __future__ import annotations

from bench.experiments import figures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.output_error import FEEDBACK, MADE, METHODS, PARTS, OutputErrorCell, removed
from bench.experiments.sweep import spread

SIDES = (576, 1024, 2048, 4096)
RANKS = (16, 64)
SHOWN = (*METHODS, FEEDBACK)
REAL = {"q_proj": 576, "o_proj": 576, "gate_proj": 576, "down_proj": 1536}


def made(options: Options) -> list[OutputErrorCell]:
    return [OutputErrorCell(MADE, side, r) for r in ranks(options) for side in SIDES]


def real(options: Options) -> list[OutputErrorCell]:
    return [OutputErrorCell(part, REAL[part], r) for r in ranks(options) for part in PARTS]


def ranks(options: Options) -> tuple[int, ...]:
    return (4,) if options.quick else RANKS


class RepairWidth(Experiment):
    name = "repair-width"
    title = "What a repair is worth in wider layers"
    claim = "nothing of this. The worth of rank r is expected to fall as r / in does, where inputs have no structure"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return [*real(options), *made(options)]

    def section(self, known: Known, options: Options) -> Section:
        rows = []
        for cell in (*real(options), *made(options)):
            what = f"made, {cell.side}" if cell.source == MADE else f"SmolLM2's {cell.source}, {cell.side}"
            shares = [tables.number(100 * removed(known[cell], method), 1) if cell in known else "" for method in SHOWN]
            rows.append([what, str(cell.r), *shares])
        text = [
            "Percent of the squared error of a layer's outputs, tr(D R Dᵀ), that nf4 makes and that is gone: of layers "
            "of SmolLM2's middle block on GSM8K, and of made square ones whose inputs' second moment has eigenvalues "
            "1 / i.",
            tables.table(["layer, in-features", "rank", *SHOWN], rows),
        ]
        return Section("\n\n".join(text), {"repair-width.png": _picture(known, options)})


def _picture(known: Known, options: Options) -> figures.Figure:
    shown = ranks(options)
    figure, axes = figures.panels([f"made layers, rank {r}" for r in shown])
    for one, r in zip(axes, shown, strict=True):
        found = {side: known[cell] for side in SIDES if (cell := OutputErrorCell(MADE, side, r)) in known}
        lines = {
            method: {side: spread([100 * removed(result, method)]) for side, result in found.items()}
            for method in SHOWN
        }
        figures.lines(one, lines)
        figures.doubling(one, SIDES)
        one.set_xlabel("in-features")
        one.set_ylabel("error removed (%)")
    figures.legend(figure, SHOWN, columns=3)
    return figure

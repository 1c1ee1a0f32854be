"""What a base in few bits loses, and how much of it repairs recover if they know the layers' inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile

from bench.experiments import figures, grid, measures, tables
from bench.experiments.claims.forgetting import prose
from bench.experiments.experiment import Cell, Experiment, Known, Options, Result, Section
from bench.experiments.figures import label
from bench.experiments.sweep import SEEDS, Spread, Sweep, loss_of

CEILING, FLOOR = "lora", "qlora"
KNOWN = (CEILING, FLOOR, "loftq", "qpissa_1", "qpissa_5", "lora_on_1", "lora_on_5")
"""Whose sweeps other experiments have."""
REPAIRS = ("repair_diagonal", "repair_1", "repair_5", "feedback", "feedback_repair", "pissa_on_repair")
FEWER = ("nf3", "nf3_repair", "nf3_both", "nf2_both")
READINGS = ("repair_8", "repair_1", "repair_512", "repair_half", "repair_prose")
ELSEWHERE = {
    "sums": (FLOOR, "lora_on_5", "repair_1", "feedback", "feedback_repair"),
    "films": (FLOOR, "lora_on_5", "repair_1", "repair_5", "feedback", "feedback_repair"),
}
"""On other tasks, beside LoRA on the dense model."""
POINTS = 3
"""Of these sweeps: all four starts of LoRA on other bases in 4 bits have their best rate in the middle."""


def sweeps(options: Options) -> dict[str, Sweep]:
    each = {method: grid.language_sweep("gsm8k", method) for method in (*KNOWN, *REPAIRS, *FEWER)}
    short = {method: replace(sweep, points=POINTS) for method, sweep in each.items() if method not in KNOWN}
    return {method: grid.sized(sweep, options) for method, sweep in (each | short).items()}


def elsewhere(task: str, options: Options) -> dict[str, Sweep]:
    sweep = grid.encoder_sweep if task in measures.ENCODED else grid.language_sweep
    each = {method: replace(sweep(task, method), points=POINTS) for method in ELSEWHERE[task]}
    return {method: grid.sized(one, options) for method, one in {CEILING: sweep(task, CEILING), **each}.items()}


def readings(known: Known, options: Options) -> dict[str, list[Cell]]:
    """The cells of each calibration, at the best rate of the first one; none while that is not known."""
    sweep = sweeps(options)["repair_1"]
    best = sweep.best(known)
    cells = [] if best is None else [sweep.at(best, seed) for seed in ((0,) if options.quick else (0, *SEEDS))]
    return {method: [replace(cell, method=method) for cell in cells] for method in READINGS}


class Repairs(Experiment):
    name = "repairs"
    title = "Fewer bits that know the layers' inputs"
    claim = (
        "nothing of this. QERA (arXiv 2410.06040, table 1; RoBERTa-base on GLUE, mean of 8 tasks): in 4.25 bits LoRA's "
        "84.00 in 16 bits become 82.75 with QLoRA, 82.92 with LoftQ, 83.71 with a repair by activations"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        found = grid.wanted(sweeps(options).values(), known, options)
        found += [cell for cells in readings(known, options).values() for cell in cells]
        others = [sweep for task in ELSEWHERE for sweep in elsewhere(task, options).values()]
        return [*found, *grid.wanted(others, known, options)]

    def section(self, known: Known, options: Options) -> Section:
        each = sweeps(options)
        results = {method: sweep.at_best(known) for method, sweep in each.items()}
        after = {method: measures.mean_of(found, loss_of) for method, found in results.items()}
        rows = [[*_row(method, results[method], after), tables.rate(each[method].best(known))] for method in each]
        head = ["base, LoRA's start", "before", "after", "less dense LoRA's", "less QLoRA's", "prose"]
        text = [
            f"{measures.TASKS['gsm8k']}, rank 16, LoRA's start (LoftQ, PiSSA: their own): held-out loss before and "
            "after training, and after it on prose that no task has; differences ± two standard errors. Repairs have "
            "rank 16, too, and are calibrated on the first 64 training problems.",
            tables.table([*head, "best rate"], rows),
            "What the repair is calibrated on (nf4, T = 1), at its best rate:",
            tables.table(["read", *head[1:]], _calibrated(known, options, after)),
        ]
        head = ["base, LoRA's start", "loss", "accuracy, %", *head[3:5], "best rate"]
        for task in ELSEWHERE:
            text.append(f"{measures.TASKS[task]}, rank 16, the same starts on nf4:")
            text.append(tables.table(head, _elsewhere(task, known, options)))
        before = {method: _before(found) for method, found in results.items()}
        return Section(
            "\n\n".join(text), {"repairs-bits.png": _against_bits(before, after), "repairs.png": _gaps(after)}
        )


def _row(method: str, results: list[Result], after: dict[str, Spread | None]) -> list[str]:
    spread = measures.mean_of(results, loss_of)
    return [
        label(method),
        tables.number(_before(results)),
        tables.measured(spread),
        *("" if method == other else tables.difference(spread, after[other]) for other in (CEILING, FLOOR)),
        tables.measured(measures.mean_of(_seeded(results), lambda result: prose("after", result))),
    ]


def _calibrated(known: Known, options: Options, after: dict[str, Spread | None]) -> list[list[str]]:
    found = readings(known, options)
    return [
        _row(method, [known[cell] for cell in takewhile(known.__contains__, cells)], after)
        for method, cells in found.items()
    ]


def _elsewhere(task: str, known: Known, options: Options) -> list[list[str]]:
    each = elsewhere(task, options)
    losses = {method: measures.over_seeds(sweep, known) for method, sweep in each.items()}
    right = {method: measures.over_seeds(sweep, known, measures.accuracy) for method, sweep in each.items()}
    return [
        [
            label(method),
            tables.measured(losses[method]),
            tables.measured(right[method], 1),
            *(
                "" if method == other else tables.difference(losses[method], losses[other])
                for other in (CEILING, FLOOR)
            ),
            tables.rate(each[method].best(known)),
        ]
        for method in each
    ]


def _seeded(results: Iterable[Result]) -> list[Result]:
    """The results of seeds above 0, which have losses before training and on prose."""
    return [result for result in results if "before" in result]


def _before(results: Iterable[Result]) -> float | None:
    """The held-out loss before training, which no seed changes; None until a seed that measures it is known."""
    return next((result["before"]["loss"] for result in _seeded(results)), None)


BITS = {"nf4": 4.13, "nf3": 3.13}
"""Of a weight, with its share of the scales."""
KINDS = {
    "plain": {"nf4": FLOOR, "nf3": "nf3"},
    "error feedback": {"nf4": "feedback"},
    "repair": {"nf4": "repair_1", "nf3": "nf3_repair"},
    "both": {"nf4": "feedback_repair", "nf3": "nf3_both"},
}


def _against_bits(before: dict[str, float | None], after: dict[str, Spread | None]) -> figures.Figure:
    """The losses of each kind of base, side by side for each format; a line at LoRA's on the dense model."""
    means = {method: None if spread is None else spread.mean for method, spread in after.items()}
    figure, axes = figures.panels(["before training", "after training"])
    for one, losses in zip(axes, (before, means), strict=True):
        for place, by_format in enumerate(KINDS.values()):
            for x, name in enumerate(BITS):
                if (loss := losses.get(by_format.get(name, ""))) is not None:
                    one.plot(
                        x + 0.16 * (place - 1.5), loss, linestyle="", markersize=7, **figures.style("", place).point
                    )
        if (ceiling := losses[CEILING]) is not None:
            one.axhline(ceiling, color="black", linewidth=0.8, zorder=0)
        one.set_xticks(range(len(BITS)), [f"{name}, {bits} bits" for name, bits in BITS.items()])
        one.set_xlim(-0.5, len(BITS) - 0.5)
        one.set_ylabel("held-out loss (nats)")
    figures.legend(figure, list(KINDS), "the line: LoRA on the dense model, n = 3 seeds; each at its best rate")
    return figure


def _gaps(after: dict[str, Spread | None]) -> figures.Figure:
    figure, (axes,) = figures.panels([f"{measures.TASKS['gsm8k']}, rank 16"], height=3.6)
    figures.gaps(axes, {method: after[method] for method in after if method != "nf2_both"}, CEILING, "loss")
    figures.note(figure, figures.GAP_NOTE)
    return figure

"""Appendix M and table 11: the gradient before the first step, and the loss after the first steps."""

from __future__ import annotations

from statistics import mean

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Result, Section
from bench.experiments.gradient import SKETCH, STARTS, GradientCell, cosine
from bench.experiments.sweep import Sweep

SEEDS = (0, 1, 2, 3, 4)
METHODS = ("lora", "pissa")
TASKS = ("films", "gsm8k", "sums")
WIDTH = 5
"""Steps whose losses are in a mean."""
WINDOWS = {"at the start": slice(0, 1)} | {f"after {k}": slice(k - 2, k + 3) for k in (5, 20, 50)}
WINDOWS["at the end"] = slice(-WIDTH, None)
"""Of `losses`, whose k-th is that after k steps."""

# Appendix M: LLaMA-3-8B, MetaMathQA.
_PAPER = {"LoRA": ("0.8884", "0.5538", "", "0.3677", ""), "PiSSA": ("0.8884", "0.3346", "", "0.2899", "")}


def sweeps(task: str, options: Options) -> dict[str, Sweep]:
    make = grid.encoder_sweep if task == "films" else grid.language_sweep
    return {method: grid.sized(make(task, method), options) for method in METHODS}


def gradients(method: str, known: Known) -> list[Result]:
    """As far as they are known."""
    cells = [GradientCell(method, seed) for seed in SEEDS]
    return [known[cell] for cell in cells if cell in known]


class FirstSteps(Experiment):
    name = "first-steps"
    title = "The gradient before training, and the first steps"
    claim = (
        "table 11: the gradient of LoRA's A is 0 and that of its B random, PiSSA's gradients are the same for every "
        "seed; appendix M: after 5 steps PiSSA's loss is 0.33 and LoRA's 0.55"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        seeds = SEEDS[:2] if options.quick else SEEDS
        cells: list[Cell] = [GradientCell(method, seed) for method in STARTS for seed in seeds]
        return cells + grid.wanted(
            [sweep for task in TASKS for sweep in sweeps(task, options).values()], known, options
        )

    def section(self, known: Known, options: Options) -> Section:
        head = ["start", "‖∂A‖", "‖∂B‖", "‖step on W‖", "cosine of ∂A", "cosine of ∂B", "cosine of the step", "seeds"]
        losses = [row for task in TASKS for row in _losses(task, known, options)]
        paper = [["the paper: LLaMA-3-8B", method, "", *row] for method, row in _PAPER.items()]
        parts = [
            "MiniLM on one batch of films, rank 16; head and batch are the same for all seeds, which draw the start "
            "alone. Norms are means ± deviation; cosines are those with seed 0's, lowest to highest, from sketches of "
            f"{SKETCH} numbers (± 0.06). The step on W is B ∂A + ∂B A, which the signs of singular vectors do not "
            "change. The fast SVD's own random sketch is fixed, so that a training's seed does not reach the start; "
            "the last row draws it anew.",
            tables.table(head, [_gradient(method, known) for method in STARTS]),
            _meaning(known),
            f"Training losses at the best rates, the mean over seeds and over {WIDTH} steps around (the same "
            "batches for both methods):",
            tables.table(["task", "method", "rate", *WINDOWS], [*losses, *paper]),
        ]
        return Section("\n\n".join(part for part in parts if part), {"first-steps.png": _picture(known, options)})


def _gradient(method: str, known: Known) -> list[str]:
    results = gradients(method, known)
    norms = [tables.measured(measures.mean_of(results, lambda r, of=of: r["norms"][of])) for of in ("a", "b", "step")]
    return [
        STARTS[method].label,
        *norms,
        *(_cosines(results, of) for of in ("a", "b", "step")),
        str(len(results)),
    ]


def _cosines(results: list[Result], of: str) -> str:
    """Of all seeds with the first; empty if there is no gradient."""
    found = [cosine(results[0], other, of) for other in results[1:]]
    numbers = [value for value in found if value is not None]
    if not numbers:
        return "" if results else tables.MISSING
    low, high = (f"{value:.3f}" for value in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def _meaning(known: Known) -> str:
    """What of table 11 holds, word for word."""
    lora, pissa, redrawn = (gradients(method, known) for method in ("lora", "pissa", "pissa_sketch"))
    if not lora or not pissa or not redrawn:
        return ""
    zero = sum(result["norms"]["a"] == 0 for result in lora)
    same = sum(result["sketches"] == pissa[0]["sketches"] for result in pissa)
    return (
        f"The gradient of LoRA's A is exactly 0 for {zero} of {len(lora)} seeds; PiSSA's gradients are the same "
        f"numbers for {same} of {len(pissa)}. With another sketch the signs of singular vectors, and with them the "
        f"gradients of A and B, are others; the step on W has a cosine of {_cosines(redrawn, 'step')}."
    )


def _losses(task: str, known: Known, options: Options) -> list[list[str]]:
    rows = []
    for method, sweep in sweeps(task, options).items():
        curves = [result["losses"] for result in sweep.at_best(known)]
        means = [_mean([losses[window] for losses in curves], window) for window in WINDOWS.values()]
        rows.append([measures.TASKS[task], figures.label(method), tables.rate(sweep.best(known)), *means])
    return rows


def _mean(parts: list[list[float]], window: slice) -> str:
    """Empty if the trainings have fewer steps."""
    if not parts:
        return tables.MISSING
    full = window.stop is None or len(parts[0]) == window.stop - window.start
    return tables.number(mean(map(mean, parts))) if full else ""


def _picture(known: Known, options: Options) -> figures.Figure:
    figure, panels = figures.panels([measures.TASKS[task] for task in TASKS])
    for axes, task in zip(panels, TASKS, strict=True):
        curves = {}
        for method, sweep in sweeps(task, options).items():
            seeds = [
                [[i + WIDTH // 2, mean(losses[i : i + WIDTH])] for i in range(0, len(losses) - WIDTH + 1, WIDTH)]
                for losses in (result["losses"] for result in sweep.at_best(known))
            ]
            if seeds:
                curves[method] = seeds
        figures.against_steps(axes, curves)
        axes.set_ylabel("training loss (nats)")
    figures.legend(
        figure, METHODS, f"n = 3 seeds, each at its best rate: means over {WIDTH} steps; pale: lowest to highest"
    )
    return figure

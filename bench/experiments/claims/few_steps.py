"""How many steps each method needs to reach LoRA's final loss, each at its best rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from bench.experiments import figures, measures, tables
from bench.experiments.claims.methods import DENSE, sweeps
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.figures import label
from bench.experiments.grid import wanted
from bench.experiments.sweep import Sweep, loss_of, spread

TASK = "gsm8k"


def curved(options: Options) -> dict[str, Sweep]:
    """The sweeps whose seeds have a curve."""
    return {method: sweep for method, sweep in sweeps(TASK, options).items() if method in DENSE}


class FewSteps(Experiment):
    name = "few-steps"
    title = "Steps to the loss that LoRA ends with"
    claim = (
        "figure 4 and appendix M: PiSSA learns faster (LLaMA-3-8B: from 0.8884, after 5 steps 0.3346 for LoRA's "
        "0.5538, after 50 steps 0.2899 for 0.3677, at one rate for both)"
    )

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return wanted(curved(options).values(), known, options)

    def section(self, known: Known, options: Options) -> Section:
        each = curved(options)
        rows = [[label(method), _steps(each[method], each["lora"], known)] for method in DENSE]
        text = [
            "Steps until the held-out loss is the one that LoRA ends with, of the same seed, on a dense base. "
            "Losses are measured every 8 steps and interpolated between. Seeds above 0; in brackets, how many of them "
            "reached it, if not all did.",
            tables.table(["method", f"{measures.TASKS[TASK]}: steps"], rows),
        ]
        return Section("\n\n".join(text), {"few-steps.png": _picture(each, known)})


def steps_to(target: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The step at which the loss is first at most the target, on the line between two measurements; None if never."""
    if curve[0][1] <= target:
        return curve[0][0]
    for (step, loss), (later, lower) in pairwise(curve):
        if lower <= target:
            return step + (later - step) * (loss - target) / (loss - lower)
    return None


def _steps(sweep: Sweep, first: Sweep, known: Known) -> str:
    """Of the seeds that both have."""
    results, targets = measures.above_0(sweep, known), measures.above_0(first, known)
    seeds = [seed for seed in results if seed in targets]
    if not seeds:
        return tables.MISSING
    found = [steps_to(loss_of(targets[seed]), measures.curve(results[seed])) for seed in seeds]
    reached = [steps for steps in found if steps is not None]
    if not reached:
        return "not reached"
    return tables.measured(spread(reached), 1) + (f" ({len(reached)} of {len(found)})" if None in found else "")


def _picture(each: Mapping[str, Sweep], known: Known) -> figures.Figure:
    figure, (axes,) = figures.panels([f"{measures.TASKS[TASK]}, dense base, rank 16"], height=3.4)
    results = {method: measures.above_0(sweep, known) for method, sweep in each.items()}
    curves = {method: [measures.curve(result) for result in found.values()] for method, found in results.items()}
    # Before training all have the base's loss, so far above that the lines could not be told apart.
    figures.against_steps(axes, {m: [seed[1:] for seed in seeds] for m, seeds in curves.items() if seeds})
    seeds = max(map(len, results.values()), default=0)
    note = f"means of n = {seeds} seeds, pale: from the least to the largest; each method at its best rate"
    figures.legend(figure, DENSE, note)
    return figure

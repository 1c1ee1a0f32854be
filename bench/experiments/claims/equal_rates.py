"""PiSSA against LoRA at equal rates, as in the paper, and each at its own best rate."""

from __future__ import annotations

from collections.abc import Mapping

from bench.experiments import figures, grid, measures, tables
from bench.experiments.experiment import Cell, Experiment, Known, Options, Section
from bench.experiments.sweep import Spread, Sweep, spread

TASKS = ("gsm8k", "sums", "films")


def sweeps(task: str, options: Options) -> tuple[Sweep, Sweep]:
    """LoRA's and PiSSA's."""
    make = grid.encoder_sweep if task == "films" else grid.language_sweep
    return grid.sized(make(task, "lora"), options), grid.sized(make(task, "pissa"), options)


class EqualRates(Experiment):
    name = "equal-rates"
    title = "PiSSA less LoRA at equal rates, and each at its best"
    claim = "table 2 and figures 4 to 7: PiSSA is above LoRA at one rate for both, 2e-5, which neither was tuned to"

    def wanted(self, known: Known, options: Options) -> list[Cell]:
        return grid.wanted([sweep for task in TASKS for sweep in sweeps(task, options)], known, options)

    def section(self, known: Known, options: Options) -> Section:
        rows, meanings = [], []
        figure, axes = figures.panels([measures.TASKS[task] for task in TASKS])
        for one, task in zip(axes, TASKS, strict=True):
            lora, pissa = sweeps(task, options)
            pairs = _pairs(lora, pissa, known)
            best = measures.over_seeds(lora, known), measures.over_seeds(pissa, known)
            name = f"{measures.TASKS[task]}, rank 16"
            rows += [[name, tables.rate(rate), *_compared(*pair)] for rate, pair in pairs.items()]
            rates = f"best: {tables.rate(lora.best(known))}, {tables.rate(pissa.best(known))}"
            rows.append([name, rates, *_compared(*best)])
            better = [tables.rate(rate) for rate, (of_lora, of_pissa) in pairs.items() if of_pissa.mean < of_lora.mean]
            meanings.append(
                f"{name}: at equal rates PiSSA is below LoRA at {len(better)} of {len(pairs)}"
                f"{' (' + ', '.join(better) + ')' if better else ''}."
            )
            _draw(one, pairs, best)
        figures.note(
            figure,
            "below 0: PiSSA is better; equal rates: n = 1; best: each at its own, over seeds, ± two standard errors",
        )
        head = ["task", "rate", "LoRA", "PiSSA", "PiSSA less LoRA ± two standard errors"]
        return Section("\n\n".join([tables.table(head, rows), " ".join(meanings)]), {"equal-rates.png": figure})


def _pairs(lora: Sweep, pissa: Sweep, known: Known) -> dict[float, tuple[Spread, Spread]]:
    """The losses of both at the rates that both have, seed 0."""
    of_lora, of_pissa = lora.losses(known), pissa.losses(known)
    return {rate: (spread([of_lora[rate]]), spread([of_pissa[rate]])) for rate in of_lora if rate in of_pissa}


def _compared(lora: Spread | None, pissa: Spread | None) -> list[str]:
    return [tables.measured(lora), tables.measured(pissa), tables.difference(pissa, lora)]


def _draw(
    axes: figures.Axes, pairs: Mapping[float, tuple[Spread, Spread]], best: tuple[Spread | None, Spread | None]
) -> None:
    """PiSSA's loss less LoRA's: a bar for each rate, and one for the best of each."""
    points = {tables.rate(rate): pair for rate, pair in pairs.items()}
    lora, pissa = best
    if lora is not None and pissa is not None:
        points["best"] = (lora, pissa)
    for name, (one, other) in points.items():
        gap = other.less(one)
        error = 2 * gap.error if gap.n > 1 else None
        hatch = "///" if name == "best" else ""
        color = figures.style("pissa").color
        axes.bar(name, gap.mean, yerr=error, capsize=3, color=color, edgecolor="white", hatch=hatch, alpha=0.8)
    if points:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("learning rate of both")
    axes.set_ylabel("loss: PiSSA less LoRA (nats)")

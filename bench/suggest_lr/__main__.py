"""Losses after training at seven rates, and at the rate that `pissa.suggest_lr` finds: SmolLM2-135M, PiSSA and LoRA,
ranks 4, 16 and 64, two data sets.

    python -m bench.suggest_lr --gsm8k DIR    # an hour and a half on one core
    python -m bench.suggest_lr                # prints what the file has

A line of JSON for each cell goes to bench/results/suggest_lr.jsonl; a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import torch

from bench.suggest_lr.cells import METHODS, RANKS, Cell, Start, rates, suggest, train
from bench.training.results import Results
from bench.training.tasks import Sentences, ShortProblems, Task
from pissa.config import Init

RESULTS = Path(__file__).parents[1] / "results" / "suggest_lr.jsonl"
SEED = 0
PHASES = ((0, 3), (3, 5), (5, 7))  # of the rates of all groups: those that are likely the best come first


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.suggest_lr", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gsm8k", type=Path, metavar="DIR", help="folder of train.jsonl and test.jsonl; only the table if not given"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a language model; SmolLM2, unpacked, if not given")
    parser.add_argument("--only", choices=("sweep", "suggestions"), help="a part of it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to add to")
    return parser.parse_args()


def sweep(tasks: list[Task], results: Results[Cell]) -> None:
    """Runs the cells at all rates that are not there yet."""
    for (first, end), method, rank in product(PHASES, METHODS, RANKS):
        start = _start(tasks, method, rank)
        for task in tasks:
            for rate in rates(method, rank)[first:end]:
                _cell(task, start, Cell(task.name, method, rank, rate, SEED), results)


def suggest_all(tasks: list[Task], results: Results[Cell]) -> None:
    """Makes the suggestions that are not there yet, and runs the cells at their rates."""
    for method, rank in product(METHODS, RANKS):
        start = _start(tasks, method, rank)
        for task in tasks:
            rate = _suggestion(task, start, method, rank, results)
            _cell(task, start, Cell(task.name, method, rank, rate, SEED), results)


def _start(tasks: list[Task], method: Init, rank: int) -> Callable[[], Start]:
    """Makes the start when it is first asked for; all tasks have one model."""
    return cache(lambda: Start(tasks[0].model(), method, rank, tasks[0].task_type))


def _cell(task: Task, start: Callable[[], Start], cell: Cell, results: Results[Cell]) -> None:
    if cell in results.cells():
        return
    alike = [row for other, row in results.cells().items() if other.task == task.name]
    results.add(train(task, start(), cell, alike[0]["before"] if alike else None))
    print(*cell, results.records[-1]["after"], results.records[-1]["seconds"], flush=True)


def _suggestion(task: Task, start: Callable[[], Start], method: Init, rank: int, results: Results[Cell]) -> float:
    if (task.name, method, rank) not in suggestions(results):
        results.add(suggest(task, start(), method, rank, SEED))
        print(results.records[-1]["text"], flush=True)
    return suggestions(results)[task.name, method, rank]


def suggestions(results: Results[Cell]) -> dict[tuple[str, str, int], float]:
    """The suggested rates by task, method and rank."""
    found = (record for record in results.records if "suggested" in record)
    return {(record["task"], record["method"], record["rank"]): record["suggested"] for record in found}


def best_of_sweeps(results: Results[Cell]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """By task, method and rank: the rate with the least loss of a sweep, and the loss at the suggested rate over that
    loss; NaN while it is not there."""
    found = {}
    for (task, method, rank), rate in suggestions(results).items():
        losses = _losses(results, task, method, rank)
        best = min((tried for tried in rates(method, rank) if tried in losses), key=lambda tried: losses[tried])
        found[task, method, rank] = best, losses.get(rate, math.nan) / losses[best]
    return found


def table(results: Results[Cell]) -> str:
    """The losses of each group in Markdown. The last column is the loss at the suggested rate over the best of the
    sweep."""
    lines = ["| task | method, r | losses by rate | best | suggested | ratio |", "|---" * 6 + "|"]
    rated = suggestions(results)
    for (task, method, rank), (best, ratio) in best_of_sweeps(results).items():
        losses, rate = _losses(results, task, method, rank), rated[task, method, rank]
        shown = ", ".join(f"{tried:g}: {losses[tried]:.4f}" for tried in sorted(rates(method, rank)) if tried in losses)
        found = f"{losses[rate]:.4f} at {rate:g} | {ratio:.3f}" if rate in losses else " | "
        lines.append(f"| {task} | {method}, {rank} | {shown} | {losses[best]:.4f} at {best:g} | {found} |")
    return "\n".join(lines)


def _losses(results: Results[Cell], task: str, method: str, rank: int) -> dict[float, float]:
    """After training, by rate."""
    group = (task, method, rank)
    return {cell.rate: row["after"]["loss"] for cell, row in results.cells().items() if cell[:3] == group}


def main() -> None:
    options = arguments()
    results = Results(options.results, Cell)
    if options.gsm8k is not None:
        torch.set_num_threads(1)
        tasks: list[Task] = [Sentences(options.model), ShortProblems(options.gsm8k, options.model)]
        if options.only != "suggestions":
            sweep(tasks, results)
        if options.only != "sweep":
            suggest_all(tasks, results)
    print(table(results))


if __name__ == "__main__":
    main()

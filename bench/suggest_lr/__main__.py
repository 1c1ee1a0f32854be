"""Losses after training at seven rates, and at the rate that `pissa.suggest_lr` finds: SmolLM2-135M, PiSSA and LoRA,
ranks 4, 16 and 64, two data sets.

    python -m bench.suggest_lr --gsm8k DIR                 # an hour on one core
    python -m bench.suggest_lr --gsm8k DIR --only-table    # prints what the file has

A line of JSON for each cell goes to bench/results/suggest_lr.jsonl; a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.suggest_lr.cells import METHODS, RANKS, Cell, Start, rates, train
from bench.training.results import Results
from bench.training.tasks import Sentences, ShortProblems, Task

RESULTS = Path(__file__).parents[1] / "results" / "suggest_lr.jsonl"
SEED = 0
PHASES = ((0, 3), (3, 5), (5, 7))  # of the rates of all groups: the likely best ones of all come first


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.suggest_lr", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", required=True, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a language model; SmolLM2, unpacked, if not given")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to add to")
    return parser.parse_args()


def sweep(tasks: list[Task], results: Results[Cell]) -> None:
    """Runs the cells at all rates that are not there yet."""
    for first, end in PHASES:
        for method in METHODS:
            for rank in RANKS:
                cells = [
                    (task, Cell(task.name, method, rank, rate, SEED))
                    for task in tasks
                    for rate in rates(method, rank)[first:end]
                ]
                cells = [(task, cell) for task, cell in cells if cell not in results.cells()]
                if not cells:
                    continue
                start = Start(tasks[0].model(), method, rank, tasks[0].task_type)
                for task, cell in cells:
                    alike = [row for other, row in results.cells().items() if other.task == task.name]
                    record = train(task, start, cell, alike[0]["before"] if alike else None)
                    results.add(record)
                    print(*cell, record["after"], record["seconds"], flush=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    tasks: list[Task] = [Sentences(options.model), ShortProblems(options.gsm8k, options.model)]
    sweep(tasks, Results(options.results, Cell))


if __name__ == "__main__":
    main()

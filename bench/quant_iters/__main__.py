"""Which number of alternations `quant_iters` a start in 4 bits should take by default, by the loss after training.

    python -m bench.quant_iters --gsm8k DIR --snippets movieReviewSnippets_GroundTruth.txt    # 40 minutes on one core

Each start is trained at five rates, seed 0. If the best rate is at an end, the sweep goes one further. Seeds 1 and 2
follow at the best rate. A line of JSON for each cell goes to bench/results/quant_iters_loss.jsonl; a cell that is there
is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch

from bench.quant_iters.cells import Cell, train, weight_errors
from bench.quant_iters.starts import STARTS
from bench.training.results import Results
from bench.training.tasks import Opinions, Problems, Task

RESULTS = Path(__file__).parents[1] / "results" / "quant_iters_loss.jsonl"
SEEDS = (1, 2)  # beside 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quant_iters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--snippets", type=Path, metavar="FILE", help="movieReviewSnippets_GroundTruth.txt")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["T = 1", "T = 5"], help="which starts to train")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to add to")
    parser.add_argument("--only-table", action="store_true", help="print what the file has")
    return parser.parse_args()


def best_rate(losses: dict[float, float]) -> float:
    """The rate of the least loss."""
    return min(losses, key=lambda rate: losses[rate])


def sweep(rates: tuple[float, ...], loss: Callable[[float], float]) -> float:
    """The best rate, which is not the least or the largest tried."""
    losses = {rate: loss(rate) for rate in rates}
    while True:
        best = best_rate(losses)
        if best == max(losses):
            losses[2 * best] = loss(2 * best)
        elif best == min(losses):
            losses[best / 2] = loss(best / 2)
        else:
            return best


def run(task: Task, starts: list[str], results: Results[Cell]) -> None:
    def loss(start: str, rate: float, seed: int) -> float:
        cell = Cell(task.name, start, rate, seed)
        if cell not in results.cells():
            alike = [r for c, r in results.cells().items() if c._replace(rate=rate) == cell]
            results.add(train(task, cell, alike[0]["before"] if alike else None))
            print(table(results), flush=True)
        return float(results.cells()[cell]["after"]["loss"])

    if not any(record["task"] == task.name and "errors_of" in record for record in results.records):
        results.add(weight_errors(task))
    middle = len(task.rates) // 2
    for rate in sorted(task.rates, key=lambda rate: abs(task.rates.index(rate) - middle)):
        for start in starts:  # the rate that is most likely the best comes first, for all starts
            loss(start, rate, 0)
    for start in starts:
        rate = sweep(task.rates, lambda rate, start=start: loss(start, rate, 0))
        for seed in SEEDS:
            loss(start, rate, seed)


def table(results: Results[Cell]) -> str:
    """All results in Markdown."""
    lines = []
    for record in results.records:
        if "errors_of" in record:
            shares = {key: value for key, value in record.items() if key.startswith("T = ")}
            lines.append(f"{record['task']}, errors left of nf4's, {record['layers']} layers: {shares}")
    cells = results.cells()
    lines += ["", "| task | start | rate | seed 0 | seed 1 | seed 2 | mean | before |", "|---" * 8 + "|"]
    for task, start, rate in dict.fromkeys((cell.task, cell.start, cell.rate) for cell in sorted(cells)):
        rows = {seed: cells.get(Cell(task, start, rate, seed)) for seed in (0, *SEEDS)}
        found = [row for row in rows.values() if row]
        shown = [_shown(row["after"]) if row else "" for row in rows.values()]
        average = f"{mean(row['after']['loss'] for row in found):.4f}" if len(found) > 1 else ""
        before = f"{mean(row['before']['loss'] for row in found):.4f}"
        lines.append(f"| {task} | {start} | {rate:g} | {' | '.join(shown)} | {average} | {before} |")
    return "\n".join(lines)


def _shown(measured: dict[str, float]) -> str:
    accuracy = f" ({measured['accuracy']:.3f})" if "accuracy" in measured else ""
    return f"{measured['loss']:.4f}{accuracy}"


def main() -> None:
    options = arguments()
    results = Results(options.results, Cell)
    if not options.only_table:
        torch.set_num_threads(1)
        for task, data in ((Opinions, options.snippets), (Problems, options.gsm8k)):
            if data is not None:
                run(task(data), options.starts, results)
    print(table(results))


if __name__ == "__main__":
    main()

"""The paper's claims on models and data that two cores can train, every method at its best rate.

    python -m bench.experiments NAME --data gsm8k=DIR reviews=DIR    # runs what is missing, writes the page
    python -m bench.experiments NAME --only-page                               # writes the page from known results
    python -m bench.experiments --again --data gsm8k=DIR reviews=DIR           # 20 known cells elsewhere, compared
    python -m bench.experiments --list

Each cell writes a line of JSON to bench/results/experiments/KIND.jsonl. A cell that is already there is not run again.
PROTOCOL.md describes what is run and how. README.md is the page.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.experiments.again import compare
from bench.experiments.experiment import Options
from bench.experiments.page import write_page
from bench.experiments.registry import EXPERIMENTS
from bench.experiments.results import Results
from bench.experiments.run import run
from pissa.cli.terminal import silence_third_parties

RESULTS = Path(__file__).parents[1] / "results" / "experiments"
PAGE = Path(__file__).parent


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}; all if none is given")
    parser.add_argument("--quick", action="store_true", help="tiny random models: whether everything runs")
    parser.add_argument("--model", metavar="M", help="a folder or a name on the hub instead of the small model")
    parser.add_argument("--data", nargs="*", default=[], type=_named, metavar="NAME=PATH", help="where data lie")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time; one thread each")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of results instead of the committed one")
    parser.add_argument("--page", type=Path, metavar="DIR", help="folder of README.md and pictures, likewise")
    parser.add_argument("--only-page", action="store_true", help="run nothing")
    parser.add_argument("--again", action="store_true", help="run 20 known cells again, and compare; no page")
    parser.add_argument("--list", action="store_true", help="the experiments and what they are about")
    options = parser.parse_args(given)
    if unknown := [name for name in options.names if name not in EXPERIMENTS]:
        parser.error(f"no experiment is called {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    if options.quick and (options.results is None or options.page is None):
        parser.error("--quick measures nothing: give --results DIR and --page DIR for what it writes")
    return options


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r}: needs NAME=PATH, where PATH exists")
    return name, Path(path)


def main() -> int:
    given = arguments()
    if given.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:<18} {experiment.title}")
        return 0
    silence_third_parties()
    torch.set_num_threads(1)
    folder = given.results or RESULTS
    options = Options(given.model, tuple(given.data), given.quick)
    chosen = [EXPERIMENTS[name] for name in given.names or EXPERIMENTS]
    results = Results(folder)
    if given.again:
        return compare(results, folder / "again", options, given.jobs)
    failed = []
    if not given.only_page:
        wanted = lambda: [cell for experiment in chosen for cell in experiment.wanted(results, options)]  # noqa: E731
        failed = run(wanted, results, options, given.jobs)
    write_page(list(EXPERIMENTS.values()), results, options, given.page or PAGE)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

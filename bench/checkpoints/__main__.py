"""Measures time and memory of `pissa init`, `pissa.load` and their peers. Each row runs in one or more processes.

    python -m bench.checkpoints --work DIR --rows peer 3b 7b     # needs both cores idle, and 40 GB of disk for 7b
    python -m bench.checkpoints --work DIR --shape tiny          # does it run?
    python -m bench.checkpoints --table                          # what was measured, in Markdown

Results are written to bench/results/checkpoints.json. A new row replaces the earlier one. Checkpoints are generated in
DIR and removed. Exit status 1: a row has failed, or has missed its goal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.checkpoints.rows import ROWS, Options, growth
from bench.compare.records import version

RESULTS = Path(__file__).parents[1] / "results" / "checkpoints.json"
PACKAGES = ("pissa", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="where checkpoints are generated")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows")
    parser.add_argument("--shape", help="a smaller model for all rows; nothing is written to the results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3, help="of calls in turns (3)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of the results and end")
    return parser.parse_args(argv)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The rows that were measured, in Markdown."""
    lines = ["| what | wanted | found | |", "|---|---|---|---|"]
    for name, row in ROWS.items():
        if name in results:
            found = results[name]
            met = ("met" if row.met(found) else "missed") if row.goal else ""
            lines.append(f"| {row.what} | {row.goal} | {row.shown(found)} | {met} |")
    return "\n".join([*lines, "", *growth(results)])


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    stored: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.table:
        print(table({name: entry["result"] for name, entry in stored.items()}))
        return 0
    from bench.compare.records import machine, write

    failed = False
    measured: dict[str, dict[str, Any]] = {}
    for name in options.rows:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            more = {name: getattr(options, name) for name in ("threads", "pairs", "shape")}
            shared = Options(Path(work).resolve(), **more)
            try:
                measured[name] = ROWS[name].measure(shared)
            except Exception as error:  # the other rows still run
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                failed = True
                continue
        packages = {package: version(package) for package in PACKAGES}
        facts = machine() | {"threads": options.threads}
        stored[name] = {"machine": facts, "packages": packages, "result": measured[name]}
        if options.shape is None:
            write(options.results, stored)
    print(table(measured))
    return int(failed or not all(ROWS[name].met(found) for name, found in measured.items()))


if __name__ == "__main__":
    sys.exit(main())

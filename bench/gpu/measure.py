"""Compares speed on a GPU with torch, PEFT and bitsandbytes. Every row is checked, then both sides are timed in turns.

    python -m bench.gpu.measure                                # everything, minutes
    python -m bench.gpu.measure decode --rows "M = 1,"         # the rows of a stage that contain this
    python -m bench.gpu.measure --device cpu --quick           # does it run? The ratios mean nothing

Times are the GPU's, between events, with cold caches. Calls are queued beforehand, so that neither side pays for its
CPU time. The start of a model and its training are timed by the wall clock. A row whose peer cannot be imported has
only our time. Exit status 1: a row failed, and its last column says why; 3: after that row the GPU computes nothing
more in this process; 75: not enough time for all rows; 77: packages are missing. A missed goal is not a failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.compare.interleave import Clock, CudaClock, Result, Row, WallClock, run
from bench.compare.records import missing, version
from bench.gpu.table import BROKEN, HEAD, STAGES, line, records

Named = tuple[str, Callable[[], Result]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all unless given")
    parser.add_argument("--rows", action="append", metavar="TEXT", help="only rows that contain this, or one of these")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of measurements per row (15)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that it runs")
    parser.add_argument("--quick", action="store_true", help="weights of 256 x 256, three pairs")
    parser.add_argument("--seconds", type=float, default=600, help="begin no row after so many seconds (600)")
    parser.add_argument("--log", type=Path, metavar="PATH", help="append a record of each row, a line of JSON")
    parser.add_argument("--tree", default="", help="of the records: what was measured")
    parser.add_argument("--run", default="", help="of the records: rows of the same run are not measured again")
    parser.add_argument("--again", action="store_true", help="measure what another run of this tree has, too")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"stages: got {', '.join(unknown)}; allowed: {', '.join(STAGES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is false")
    if options.quick:
        options.pairs = min(options.pairs, 3)
    return options


def machine(options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    from pissa import build_info

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": options.device,
        "pissa": build_info()["version"],
        "cuda library": build_info()["cuda"],
        **{package: version(package) for package in ("torch", "triton", "transformers", "peft", "bitsandbytes")},
        "pairs": options.pairs,
        "quick": options.quick,
    }
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        facts["card"] = torch.cuda.get_device_name()
        facts["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        facts["capability"] = list(torch.cuda.get_device_capability())
        facts["cuda of torch"] = torch.version.cuda
        facts |= peaks(clock)
    return facts


def peaks(clock: Clock) -> dict[str, float]:
    """Measures the limits of the card: a copy of 1 GiB within its memory, and one large bfloat16 product."""
    source, target = torch.zeros(2, 1 << 30, dtype=torch.uint8, device="cuda")
    copy_ms = statistics.median(clock(lambda: target.copy_(source), 5) for _ in range(5))
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product_ms = statistics.median(clock(lambda: a @ b, 5) for _ in range(5))
    return {"copy, GB/s": 2 * (1 << 30) / copy_ms / 1e6, "bfloat16 product, TFLOP/s": 2 * 8192**3 / product_ms / 1e9}


def rows_of(stage: str, options: argparse.Namespace, clock: Clock) -> Iterator[Named]:
    """Yields the name of each row of a stage and the function that measures it."""
    from bench.gpu.rows import decode_rows, linear_rows, nf4_rows
    from bench.gpu.rows_models import model_rows
    from bench.gpu.rows_start import start_rows

    size = 256 if options.quick else 4096
    if stage == "start":
        yield from start_rows(options.device, options.quick)
        return
    wall = WallClock(options.device)
    rows: dict[str, tuple[Iterator[Row], Clock]] = {
        "linear": (linear_rows(size, options.device, clock), clock),
        "nf4": (nf4_rows(size, options.device), clock),
        "decode": (decode_rows(size, options.device), clock),
        "models": (model_rows(options.device, options.quick), wall),
    }
    for row in rows[stage][0]:
        yield f"{row.work} | {row.against}", lambda row=row: run(row, options.pairs, rows[stage][1])


class Log:
    """The records of earlier and of this process. Each row has two: that it begins, and its result."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path: Path | None = options.log
        self._key = {"tree": options.tree, "run": options.run}
        found = [record for record in records(self._path) if record["tree"] == options.tree] if self._path else []
        mine = [record for record in found if record["run"] == options.run]
        self.has_machine = any("machine" in record for record in found)
        self.begun = {record["begun"] for record in found if "begun" in record}
        self.done = {record["name"] for record in mine if "row" in record}
        self.killed = {record["begun"] for record in mine if "begun" in record} - self.done
        if not options.again:
            self.done |= {r["name"] for r in found if "row" in r and not r["row"]["failed"]}

    def write(self, **record: Any) -> None:
        if self._path:
            with self._path.open("a") as file:
                print(json.dumps(self._key | record, ensure_ascii=False), file=file)


def measured(name: str, measure: Callable[[], Result], log: Log) -> Result:
    if name in log.killed:
        work, _, against = name.partition(" | ")
        note = "the process that measured it ended"
        return Result(work, against, "default", None, None, [], [], [], None, note, True)
    log.write(begun=name)
    return measure()


def is_broken(device: str) -> bool:
    """Whether an error on the GPU keeps everything after it in this process from running."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def main() -> int:
    options = arguments()
    begin = time.monotonic()
    clock: Clock = CudaClock() if options.device == "cuda" else WallClock()
    log = Log(options)
    if not log.has_machine:
        facts = machine(options, clock)
        print(json.dumps(facts, indent=1, ensure_ascii=False), flush=True)
        log.write(machine=facts)
    failed, asked, left_out, not_begun = False, 0, "", []
    print(HEAD, flush=True)
    for stage in options.stages or STAGES:
        if stage == "models" and (lacking := missing("peft", "transformers")):
            left_out = f"rows of models: {lacking}"
            continue
        chosen = [row for row in rows_of(stage, options, clock) if any(text in row[0] for text in options.rows or [""])]
        asked += len(chosen)
        # Those that have begun in an earlier run, and took it to its end, come last.
        for name, measure in sorted(chosen, key=lambda row: row[0] in log.begun):
            if name in log.done:
                continue
            if time.monotonic() - begin > options.seconds:
                not_begun.append(name)
                continue
            start = time.monotonic()
            result = measured(name, measure, log)
            failed |= result.failed
            row = {key: value for key, value in result.as_dict().items() if key not in ("setting", "growth_mib")}
            log.write(name=name, stage=stage, row=row)
            print(f"{line(row)}  [{time.monotonic() - start:.1f} s] {result.note}", flush=True)
            if result.failed:
                print(f"error: {result.work}: {result.note}", flush=True)
            if is_broken(options.device):
                return BROKEN
    if not (asked or left_out):
        print(f"error: no row contains {' or '.join(options.rows)}")
        return 1
    if not_begun:
        print(f"no time for {len(not_begun)} rows, from {not_begun[0]}")
    if left_out:
        print(left_out)
    return 1 if failed else 75 if not_begun else 77 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())

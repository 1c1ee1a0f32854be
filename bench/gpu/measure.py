"""Speed on a GPU beside torch, PEFT and bitsandbytes. Every row is checked, then both sides are timed in turns.

    python -m bench.gpu.measure --json bench/results/card.json     # everything, minutes
    python -m bench.gpu.measure --rows decoding                    # rows that contain one of these
    python -m bench.gpu.measure --device cpu --quick               # does it run? The ratios mean nothing

Times are the GPU's, between events, with cold caches. Calls are queued beforehand, so that neither side pays for its
CPU time; the start of a model is timed by the wall clock. The file is written after every row. Exit status 1: a row
failed, and its last column says why, or was not begun in time. A missed goal is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.compare.interleave import Clock, CudaClock, HostClock, Result, quartiles, run

COLUMNS = "work | against | goal | peer / ours (quartiles) | ours, ms | peer, ms"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[""], metavar="TEXT", help="only rows that contain one of these")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of measurements per row (15)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that it runs")
    parser.add_argument("--quick", action="store_true", help="weights of 256 x 256, three pairs")
    parser.add_argument("--seconds", type=float, default=600, help="begin no row after so many seconds (600)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every measurement there, after each row")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is false")
    if options.quick:
        options.pairs = min(options.pairs, 3)
    return options


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def work(options: argparse.Namespace, clock: Clock) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Yields the name of each row and the function that measures it."""
    from bench.gpu.rows import gpu_rows, start_of_a_model

    for row in gpu_rows(256 if options.quick else 4096, options.device, clock):
        yield f"{row.work} | {row.against}", lambda row=row: run(row, options.pairs, clock)
    for quantised in (False, True):
        yield (
            ("QPiSSA" if quantised else "PiSSA") + " start of a 7B model",
            lambda quantised=quantised: start_of_a_model(quantised, options.device, options.quick),
        )


def line(result: Result) -> str:
    """The result as a row of the table in README.md."""
    goal = "" if result.goal is None else f"{result.goal:g}"
    if result.failed:
        return f"| {result.work} | {result.against} | {goal} | FAILED: {result.note.replace('|', '/')} | | |"
    ours, theirs, ratio = (statistics.median(values) for values in (result.ours_ms, result.peer_ms, result.ratios))
    lower, upper = quartiles(result.ratios)
    shown = f"**{ratio:.2f}**" if result.goal is not None and ratio >= result.goal else f"{ratio:.2f}"
    return (
        f"| {result.work} | {result.against} | {goal} | {shown} ({lower:.2f} to {upper:.2f}) "
        f"| {ours:.3g} | {theirs:.3g} |"
    )


def main() -> int:
    options = arguments()
    begin = time.monotonic()
    clock: Clock = CudaClock() if options.device == "cuda" else HostClock()
    facts = machine(options, clock)
    print(json.dumps(facts, indent=1, ensure_ascii=False), flush=True)
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    not_begun: list[str] = []

    def write() -> None:
        if options.json:
            found = {"machines": [facts], "rows": rows, "not begun": not_begun}
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            partial.rename(options.json)

    write()
    failed = False
    for name, measure in work(options, clock):
        if not any(text in name for text in options.rows):
            continue
        if time.monotonic() - begin > options.seconds:
            not_begun.append(name)
            continue
        start = time.monotonic()
        result = measure()
        failed |= result.failed
        rows.append({key: value for key, value in result.as_dict().items() if key not in ("malloc", "growth_mib")})
        lines.append(line(result))
        print(f"{lines[-1]}  [{time.monotonic() - start:.1f} s] {result.note}", flush=True)
        write()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    write()
    print(f"\n| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}", *lines, sep="\n", flush=True)
    for name in not_begun:
        print(f"not begun within {options.seconds:g} s: {name}")
    return int(failed or bool(not_begun) or not rows)


if __name__ == "__main__":
    sys.exit(main())

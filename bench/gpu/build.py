"""The stages that build: packages, CMake, the libraries and tests for this card, and `pissa` as it is imported here."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from bench.gpu.machine import CMAKE, ROOT, SITE, Machine, output, query
from bench.gpu.stages import Stage, StageError

CPP_BENCHMARKS = ("bench_nf4", "bench_linear", "bench_svd")


def packages(stage: Stage, machine: Machine) -> None:
    prepared = [machine.prepared] if machine.prepared else []
    stage.run(sys.executable, "-m", "bench.gpu.packages", SITE, *prepared, cwd=ROOT)


def configure(stage: Stage, machine: Machine) -> None:
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "PISSA_CUDA": "ON",
        "PISSA_CUDA_ARCHITECTURES": f"{query('compute_cap').replace('.', '')}-real",
        "PISSA_BUILD_TESTS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": output(sys.executable, "-m", "pybind11", "--cmakedir").strip(),
    }
    googletest = _source(machine, "googletest", "/usr/src/googletest")
    benchmark = _source(machine, "benchmark")
    if googletest:
        options["PISSA_GOOGLETEST_DIR"] = str(googletest)
    if benchmark or Path("/usr/include/benchmark/benchmark.h").exists():
        options["PISSA_BUILD_BENCH"] = "ON"
    else:
        stage.say("no Google Benchmark: the C++ benchmarks are left out")
    if benchmark:
        options["PISSA_BENCHMARK_DIR"] = str(benchmark)
    stage.run("cmake", "-S", ROOT, "-B", CMAKE, *(f"-D{name}={value}" for name, value in options.items()))


def _source(machine: Machine, name: str, *installed: str) -> Path | None:
    """A folder of sources: the prepared one, else one of those that may be installed."""
    prepared = [machine.prepared / name] if machine.prepared else []
    return next((path for path in (*prepared, *map(Path, installed)) if path.is_dir()), None)


def build(stage: Stage) -> None:
    """Builds the libraries, the tests and the benchmarks. One that fails does not keep the others from being built."""
    found = output("cmake", "--build", str(CMAKE), "--target", "help")
    tests = sorted(set(re.findall(r"^(cuda_(?!sim)[a-z0-9_]*_test): ", found, re.MULTILINE)))
    if not tests:
        raise StageError("the build has no tests cuda_*_test")
    benchmarks = CPP_BENCHMARKS if (CMAKE / "bench/cpp").is_dir() else ()
    targets = ("_C", "pissa_cuda13", *tests, *benchmarks)
    stage.run("cmake", "--build", CMAKE, "-j", os.cpu_count(), "--target", *targets, "--", "-k", "0")


def module(stage: Stage) -> None:
    """Puts the libraries and the Python files together as `pissa` in SITE, and tries them."""
    stage.run("cmake", "--install", CMAKE, "--component", "python", "--prefix", SITE)
    for path in (ROOT / "python").rglob("*.py"):
        target = SITE / path.relative_to(ROOT / "python")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    stage.run(sys.executable, "-m", "bench.gpu.smoke", cwd=ROOT)

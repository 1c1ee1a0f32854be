"""The stage correctness: the C++ tests on the GPU, and Python's, each by its own runner."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.machine import ROOT, Machine
from bench.gpu.stages import Job, LeftOutError, StageError

# Python tests that take --device: of the ops, and of layers and models, which need more packages.
OPS_TESTS = ("ops_linear", "ops_nf4", "ops_int8", "ops_svd", "alternate")
MODEL_TESTS = ("layer", "model")
MODEL_PACKAGES = ("peft", "transformers", "xxhash")
# Warnings are no errors here: the versions of torch and transformers are this machine's.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")


def cpp_tests(job: Job, machine: Machine) -> None:
    # By the ctest that came with the cmake that made the build.
    ctest = Path(shutil.which("cmake") or "cmake").with_name("ctest")
    options = ("-L", f"^{machine.kind}$", "-j", "8", "--no-tests=error", "--output-on-failure")
    status = job.status([ctest, "--test-dir", machine.cmake, *options])
    passed, failed = ctest_results(job.lines())
    job.notes.append(f"C++ tests: {passed} passed, {len(failed)} failed")
    if failed or status:
        raise StageError(", ".join(failed) or f"ctest ended with status {status}")


def ctest_results(lines: list[str]) -> tuple[int, list[str]]:
    """How many tests passed, and of each that failed its name and how many cases did, or what else it was."""
    passed, failed = 0, {}
    cases: set[str] = set()
    for line in lines:
        if found := re.match(r"\s*\d+/\d+ Test +#\d+: (\w+) [ .]*(.*?) +[\d.]+ sec", line):
            name, how = found[1], found[2]
            passed += how == "Passed"
            cases = set()
            if how != "Passed":
                failed[name] = (how.replace("***", " ").strip(" :"), cases)
        elif found := re.match(r"\[  FAILED  \] ([\w/]+\.[\w/]+)", line):
            cases.add(found[1])
    return passed, [f"{name}: {_count(cases) if cases else how}" for name, (how, cases) in failed.items()]


def _count(cases: set[str]) -> str:
    return f"{len(cases)} case{'s' if len(cases) > 1 else ''}"


def test_file(name: str) -> Path:
    """The file of Python tests of that name, whichever folder it is in."""
    (path,) = (ROOT / "tests/python").rglob(f"test_{name}.py")
    return path


def _missing(*packages: str) -> list[str]:
    return [package for package in packages if not importlib.util.find_spec(package)]


def _needs(what: str, *packages: str) -> None:
    if missing := _missing(*packages):
        raise LeftOutError(f"{what}: no {', '.join(missing)}")


def gpu_tests(job: Job, machine: Machine) -> None:
    """What only a GPU shows. The rehearsal collects these tests."""
    _needs("pytest -m gpu", "pytest", *MODEL_PACKAGES)
    how = ("--collect-only",) if machine.rehearsal else ()
    _pytest(job, {"gpu": (*PYTEST, "-m", "gpu", *how, test_file("gpu"))})


def device_tests(job: Job, machine: Machine) -> None:
    """Runs the files that take --device side by side; the rehearsal a small one, for on the CPU others run them."""
    _needs("pytest --device", "pytest", "hypothesis")
    names = OPS_TESTS + MODEL_TESTS
    if missing := _missing(*MODEL_PACKAGES):
        job.left_out.append(f"tests of layers and models: no {', '.join(missing)}")
        names = OPS_TESTS
    if machine.rehearsal:
        names = ("ops_int8",)
    options = ("--device", machine.device, "-m", "not slow and not gpu", "--maxfail", "30")
    _pytest(job, {name: (*PYTEST, *options, test_file(name)) for name in names})


def _pytest(job: Job, commands: dict[str, tuple[object, ...]]) -> None:
    def test(name: str) -> int | None:
        log = job.log.with_name(f"pytest-{name}.log")
        log.write_text("")
        return job.status(commands[name], log, cwd=ROOT)

    with ThreadPoolExecutor(len(commands)) as pool:
        statuses = dict(zip(commands, pool.map(test, commands), strict=True))
    failed = []
    for name, status in statuses.items():
        lines = job.log.with_name(f"pytest-{name}.log").read_text(errors="replace").splitlines()
        last = lines[-1].strip("= ") if lines else "no output"
        job.say(f"{name}: {last}")
        job.say("\n".join([line for line in lines if line.startswith(("FAILED", "ERROR"))][:12]))
        job.notes.append(f"test_{name}.py: {last}")
        if status:
            failed.append(f"test_{name}.py: {last}")
    if failed:
        raise StageError(", ".join(failed))

"""The stages that test and measure: C++ tests, compute-sanitizer, Python tests, benchmarks."""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.build import CPP_BENCHMARKS
from bench.gpu.machine import CMAKE, LOGS, ROOT
from bench.gpu.stages import Stage, StageError

# A test for the sanitizer, and its cases (gtest_filter): cases of few elements.
SANITIZED = {
    "elementwise": "*",
    "philox": "*",
    "nested_scales": "*",
    "nf4_golden": "*",
    "gemm_quantized": "*",
    "weight_gemm": "*FewRows*",
    "gemm": "*WithoutTerms*:*AddsToItsOutput*:*FewerColumns*:*InnerDimension*",
    "gram": "*EigenvaluesAre*",
    "orthonormalize": "*LeavesOrthonormal*:*AgainAfter*",
    "linear": "*ZeroTokens*:*ZeroDeltas*",
    "add_low_rank": "*",
    "svd": "*AWeightInNf4*:*TheSeedMatters*",
}
SANITIZER_S = 20  # of each tool on each test

# Python tests that take --device.
PYTHON_TESTS = ("ops_linear", "ops_nf4", "ops_int8", "ops_svd", "layer", "model")
# Warnings are no errors here: the versions of torch and transformers are this machine's.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")


def cpp_tests(stage: Stage) -> None:
    # By the ctest that came with the cmake that made the build.
    ctest = Path(shutil.which("cmake") or "cmake").with_name("ctest")
    options = ("-L", "^cuda$", "-j", "8", "--no-tests=error", "--output-on-failure")
    stage.run(ctest, "--test-dir", CMAKE, *options)


def sanitizer(stage: Stage) -> None:
    """Runs memcheck and racecheck, several at a time. A test that is cut off passes if no mistake was found before."""
    if not shutil.which("compute-sanitizer"):
        raise StageError("no compute-sanitizer")
    jobs = [(tool, name) for name in SANITIZED for tool in ("memcheck", "racecheck")]
    with ThreadPoolExecutor(8) as pool:
        passed = list(pool.map(lambda job: _sanitized(stage, *job), jobs))
    if not all(passed):
        raise StageError("the sanitizer found mistakes, or could not run")


def _sanitized(stage: Stage, tool: str, name: str) -> bool:
    test = CMAKE / f"tests/cpp/cuda_{name}_test"
    if not test.exists():
        stage.say(f"no {test.name}")
        return False
    log = LOGS / f"sanitizer-{tool}-{name}.log"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", test, f"--gtest_filter={SANITIZED[name]}"]
    status = stage.status(command, log, SANITIZER_S)
    text = log.read_text(errors="replace")
    begun = text.count("[ RUN ")
    clean = len(re.findall("ERROR SUMMARY: 0|RACECHECK SUMMARY: 0", text))
    how = "cut off" if status is None else f"status {status}"
    stage.say(f"{tool} {name}: {how}, {begun} cases begun, {clean} clean summaries")
    if status is None:
        return not re.search("========= (Error|Invalid|Race)", text)
    if status != 0 or not begun:
        stage.say("\n".join(text.splitlines()[-30:]))
        return False
    return True


def test_file(name: str) -> Path:
    """The file of Python tests of that name, whichever folder it is in."""
    (path,) = (ROOT / "tests/python").rglob(f"test_{name}.py")
    return path


def python_tests(stage: Stage) -> None:
    """Runs the files that take --device side by side."""
    files = {name: test_file(name) for name in PYTHON_TESTS}

    def test(name: str) -> int | None:
        options = ("--device", "cuda", "-m", "not slow and not gpu", "--maxfail", "30")
        return stage.status([*PYTEST, *options, files[name]], LOGS / f"python-{name}.log", cwd=ROOT)

    with ThreadPoolExecutor(len(files)) as pool:
        statuses = list(pool.map(test, files))
    for name in files:
        lines = (LOGS / f"python-{name}.log").read_text(errors="replace").splitlines()
        stage.say(f"{name}: {lines[-1] if lines else ''}")
        stage.say("\n".join([line for line in lines if line.startswith(("FAILED", "ERROR"))][:12]))
    if any(statuses):
        raise StageError("tests failed")


def gpu_tests(stage: Stage) -> None:
    stage.run(*PYTEST, "-m", "gpu", test_file("gpu"), cwd=ROOT)


def measure(stage: Stage, results: Path) -> None:
    command = (sys.executable, "-u", "-m", "bench.gpu.measure", "--seconds", "130", "--json", results)
    stage.run(*command, cwd=ROOT)


def measure_cpp(stage: Stage) -> None:
    options = ["--backend=cuda", "--benchmark_min_time=0.05s", "--benchmark_repetitions=3"]
    options += ["--benchmark_report_aggregates_only=true", "--benchmark_out_format=json"]
    for name in CPP_BENCHMARKS:
        stage.run(CMAKE / f"bench/cpp/{name}", *options, f"--benchmark_out={LOGS / name}.json")

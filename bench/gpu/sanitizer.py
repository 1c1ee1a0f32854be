"""The stage sanitizer: compute-sanitizer over small cases of the C++ tests. Only our own kernels are watched."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

from bench.gpu.machine import Machine
from bench.gpu.stages import Job, LeftOutError, StageError

# A test for the sanitizer, and its cases (gtest_filter): cases of few elements.
SANITIZED = {
    "elementwise": "*",
    "philox": "*",
    "nested_scales": "*",
    "nf4_golden": "*",
    "gemm_quantized": "*",
    "weight_gemm": "*FewRows*",
    "few_rows": "*EveryEdge*",
    "gemm": "*WithoutTerms*:*AddsToItsOutput*:*FewerColumns*:*InnerDimension*",
    "gram": "*EigenvaluesAre*",
    "eigh": "*EachMatrixOfAStack*",
    "orthonormalize": "*LeavesOrthonormal*:*AgainAfter*",
    "linear": "*ZeroTokens*:*ZeroDeltas*",
    "add_low_rank": "*",
    "svd": "*AWeightInNf4*:*TheSeedMatters*",
}
AT_ONCE = 6  # processes on one GPU
SECONDS = 40  # of a test: starting takes 10
OURS = "kns=pissa"  # a part of our kernels' names; cuBLAS and cuSOLVER are not watched, which takes most of the time


def sanitize(job: Job, machine: Machine, tool: str) -> None:
    """Runs `tool` (memcheck, racecheck) on each test. One that was cut off or ran no case has not passed."""
    if not shutil.which("compute-sanitizer"):
        raise LeftOutError("the sanitizer: no compute-sanitizer")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda name: _sanitized(job, machine, tool, name), SANITIZED))
    problems = [problem for problem in found if problem]
    job.notes.append(f"{tool}: {len(SANITIZED) - len(problems)} tests clean, {len(problems)} not")
    if problems:
        raise StageError(", ".join(problems))


def _sanitized(job: Job, machine: Machine, tool: str, name: str) -> str | None:
    """What is wrong with a test, or None."""
    test = machine.cmake / f"tests/cpp/{machine.kind}_{name}_test"
    if not test.exists():
        return f"{test.name}: not built"
    log = job.log.with_name(f"{tool}-{name}.log")
    log.write_text("")
    options = ("--tool", tool, "--error-exitcode", "99", "--kernel-regex", OURS)
    status = job.status(["compute-sanitizer", *options, test, f"--gtest_filter={SANITIZED[name]}"], log, SECONDS)
    problem = problem_of(status, log.read_text(errors="replace"))
    job.say(f"{tool} {name}: {problem or 'clean'}")
    return f"{test.name}: {problem}" if problem else None


def problem_of(status: int | None, text: str) -> str | None:
    """What keeps a run from having passed. Args: its exit status, None if it was cut off, and its output."""
    begun = text.count("[ RUN ")
    errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if any(int(count) for count in errors):
        return f"{sum(map(int, errors))} errors"
    if status is None:
        return f"cut off after {SECONDS} s in case {begun}"
    if status:
        return f"status {status}"
    if not begun:
        return "ran no case"
    return None if errors else "no summary of the sanitizer"

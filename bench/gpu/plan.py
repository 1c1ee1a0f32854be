"""The stages and their parts, in the order in which they run: first what is most likely to fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu import build, correctness, sanitizer
from bench.gpu.machine import ROOT, Machine
from bench.gpu.stages import Job, LeftOutError, NotFinishedError, OutOfTimeError, Part, StageError
from bench.gpu.table import BROKEN, records
from bench.gpu.table import STAGES as MEASURED

STAGES = ("build", "correctness", *MEASURED, "sanitizer", "profile")
# Seconds of each stage of rows; nothing of it begins in the last third.
SECONDS = {"start": 150, "linear": 120, "nf4": 60, "decode": 90, "models": 90}
SLOWER = 5  # may everything be in the rehearsal, on a CPU that others use too


@dataclass(frozen=True)
class Measuring:
    """How rows are measured: those that contain one of `texts`, if any are given; those that a run before `run` has
    measured with the sources `tree` only if `again`."""

    machine: Machine
    tree: str
    run: str
    texts: list[str]
    again: bool

    def __call__(self, job: Job, stage: str) -> None:
        """Measures a stage in a process of its own, and in another one what an error of the GPU has left."""
        log = self.machine.build / "rows.jsonl"
        command = [
            sys.executable,
            "-u",
            "-m",
            "bench.gpu.measure",
            stage,
            "--log",
            log,
            "--device",
            self.machine.device,
        ]
        command += [
            "--tree",
            self.tree,
            "--run",
            self.run,
            "--seconds",
            SECONDS[stage] * (SLOWER if self.machine.rehearsal else 2 / 3),
        ]
        command += [*(f"--rows={text}" for text in self.texts), *["--again"] * self.again]
        command += ["--quick", "--pairs", "1"] if self.machine.rehearsal else []
        status: int | None = BROKEN
        while status == BROKEN or (status and status < 0):
            before = len(records(log))
            try:
                status = job.status(command, cwd=ROOT)
            except OutOfTimeError:
                begun = [record["begun"] for record in records(log)[before:] if "begun" in record]
                job.notes.append(f"{stage}: the time was over in {begun[-1] if begun else 'the beginning'}")
                raise
            if len(records(log)) == before:
                break
        self._judge(job, stage, status, log)

    def _judge(self, job: Job, stage: str, status: int | None, log: Path) -> None:
        mine = [r for r in records(log) if r["run"] == self.run and r.get("stage") == stage]
        failed = {r["name"]: r["row"]["note"] for r in mine if r["row"]["failed"]}
        lines = job.lines()
        if self.texts and self.again and not mine:
            raise NotFinishedError(f"no row contains {' or '.join(map(repr, self.texts))}")
        if failed:
            name, note = next(iter(failed.items()))
            raise StageError(f"{len(failed)} of {len(mine)} rows: {name.partition(' | ')[0]}: {note[:160]}")
        if late := [line for line in lines if line.startswith("not begun within")]:
            raise NotFinishedError(f"no time for {len(late)} rows")
        if left_out := [line for line in lines if line.startswith(f"{stage}: left out: ")]:
            raise LeftOutError(f"{stage}: {left_out[0].partition(': left out: ')[2]}")
        if status:
            raise StageError(f"{lines[-1][:160] if lines else ''} (status {status})")


def _profile(job: Job, machine: Machine) -> None:
    quick = ("--quick",) if machine.rehearsal else ()
    job.run(sys.executable, "-u", "-m", "bench.gpu.profiling", "--device", machine.device, *quick, cwd=ROOT)
    job.notes += ["", "kernels by their time:", *(line for line in job.lines() if not line.startswith("USDT"))]


def _cpp_benchmarks(job: Job, machine: Machine) -> None:
    options = [f"--backend={machine.device}", "--benchmark_min_time=0.05s", "--benchmark_repetitions=3"]
    for name in build.CPP_BENCHMARKS:
        job.run(machine.cmake / f"bench/cpp/{name}", *options, "--benchmark_report_aggregates_only=true")
    job.notes += [line[:160] for line in job.lines() if line.startswith("Benchmark") or "_median" in line]


def parts(machine: Machine, measure: Measuring) -> list[Part]:
    """All parts, each after those that it needs."""
    slower = SLOWER if machine.rehearsal else 1

    def part(stage: str, name: str, seconds: float, work: Callable[..., None], *needs: str, **options: str) -> Part:
        return Part(stage, name, slower * seconds, partial(work, machine=machine, **options), needs)

    def of_tests(*arguments: Any, **options: str) -> Part:
        return replace(part(*arguments, "compile", **options), after=("compile-tests",))

    return [
        part("build", "configure", 60, build.configure),
        part("build", "compile", 300, build.compile_library, "configure"),
        part("build", "module", 40, build.module, "compile"),
        part("build", "compile-tests", 300, build.compile_tests, "compile"),
        of_tests("correctness", "cpp-tests", 120, correctness.cpp_tests),
        part("correctness", "gpu-tests", 90, correctness.gpu_tests, "module"),
        part("correctness", "device-tests", 120, correctness.device_tests, "module"),
        *(
            Part(stage, stage, slower * SECONDS[stage], partial(measure, stage=stage), ("module",))
            for stage in MEASURED
        ),
        of_tests("sanitizer", "memcheck", 100, sanitizer.sanitize, tool="memcheck"),
        of_tests("sanitizer", "racecheck", 100, sanitizer.sanitize, tool="racecheck"),
        part("profile", "kernels", 90, _profile, "module"),
        part("profile", "compile-benchmarks", 60, build.compile_benchmarks, "compile"),
        part("profile", "cpp-benchmarks", 60, _cpp_benchmarks, "compile-benchmarks"),
    ]


def wanted(every: list[Part], stages: Collection[str], passed: Collection[str]) -> list[Part]:
    """The parts of the stages, and those that they need and that have not passed; in order."""
    names = {part.name for part in every if part.stage in stages}
    for part in reversed(every):
        if part.name in names:
            names |= {need for need in (*part.needs, *part.after) if need not in passed}
    return [part for part in every if part.name in names]

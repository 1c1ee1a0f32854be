"""The parts of bench/gpu that decide what has passed: stages, outputs of ctest and the sanitizer, what is run again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_the_tests_that_it_names_exist() -> None:
    from bench.gpu import correctness, sanitizer

    for name in (*correctness.OPS_TESTS, *correctness.MODEL_TESTS, "gpu"):
        assert correctness.test_file(name).is_file()
    for name, cases in sanitizer.SANITIZED.items():
        (path,) = (ROOT / "tests/cpp").rglob(f"{name}_test.cc")
        missing = [case for case in re.findall(r"\w+", cases) if case not in path.read_text()]
        assert not missing, f"{path} has no tests {missing}"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", ROOT / "bench/gpu.sh"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "no GPU: nvidia-smi names none on this machine\n"


def test_it_starts_without_torch() -> None:
    """What this machine lacks is said in the first second; importing torch takes several."""
    code = "import sys, bench.gpu.__main__; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_part_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.gpu.stages import Job, LeftOutError, NotFinishedError, Outcome, Part, run_part
    from bench.gpu.summary import first_line

    outcomes: dict[str, Outcome] = {}
    parts: list[Part] = []

    def run(name: str, work: Any, *needs: str, seconds: float = 30, left: float = 600, after: str = "") -> Any:
        part = Part(f"stage of {name}", name, seconds, work, needs, tuple(after.split()))
        parts.append(part)
        outcomes[name] = run_part(part, outcomes, tmp_path, left)
        return outcomes[name].how, outcomes[name].why

    def raises(error: Exception) -> object:
        def work(job: Job) -> None:
            raise error

        return work

    assert run("passes", lambda job: job.run("true")) == ("passed", "")
    assert run("fails", lambda job: job.run("sh", "-c", "echo why; exit 3")) == ("failed", "sh ended with status 3")
    assert run("slow", lambda job: job.run("sleep", "600"), seconds=1) == ("failed", "out of its 1 s")
    assert run("late", lambda job: job.run("sleep", "600"), left=11) == ("not run", "cut off, no time")
    assert run("too late", raises(KeyError()), left=5) == ("not run", "no time")
    assert run("broken", raises(KeyError("of any kind"))) == ("failed", "KeyError: 'of any kind'")
    assert run("half", raises(NotFinishedError("no time for 2 rows"))) == ("not run", "no time for 2 rows")
    assert run("lacks", raises(KeyError()), "passes", "fails") == ("not run", "for lack of fails")
    assert run("makes do", lambda job: job.run("true"), "passes", after="fails") == ("passed", "")
    assert run("after it", raises(KeyError()), after="lacks") == ("not run", "for lack of lacks")
    assert run("lacks too", raises(KeyError()), "lacks") == ("not run", "for lack of lacks")
    assert run("absent", raises(LeftOutError("no GoogleTest"))) == ("left out", "no GoogleTest")
    assert run("absent too", raises(KeyError()), "absent") == ("left out", "no GoogleTest")
    assert run("last", lambda job: job.left_out.append("no peft"), "passes") == ("passed", "")
    assert "    why\n" in capsys.readouterr().out
    assert first_line(parts, outcomes) == (
        "FAILED: stage of fails (sh ended with status 3), stage of slow (out of its 1 s), stage of broken (KeyError: "
        "'of any kind'); not run: stage of late (cut off, no time), stage of too late (no time), stage of half (no "
        "time for 2 rows), stage of lacks, stage of after it, stage of "
        "lacks too; left out: no GoogleTest, no peft"
    )


def test_what_ctest_says_is_counted() -> None:
    """Lines of ctest 4.4 and GoogleTest 1.17."""
    from bench.gpu.correctness import ctest_results

    lines = """
      Start 1: cuda_philox_test
 1/4 Test  #1: cuda_philox_test ....................   Passed    0.02 sec
 2/4 Test #12: cuda_gemm_quantized_test ............***Failed    1.20 sec
[  FAILED  ] Gpu/GemmTest.EverySize/f32 (3 ms)
[  FAILED  ] Gpu/GemmTest.EverySize/f32, where GetParam() = 1 (3 ms)
[  FAILED  ] Gpu/GemmTest.TheSameBits/f32 (3 ms)
 3/4 Test #13: cuda_svd_test .......................***Timeout 600.01 sec
 4/4 Test #14: cuda_split_test .....................Subprocess aborted***Exception:   0.52 sec
""".splitlines()
    failed = [
        "cuda_gemm_quantized_test: 2 cases",
        "cuda_svd_test: Timeout",
        "cuda_split_test: Subprocess aborted Exception",
    ]
    assert ctest_results(lines) == (1, failed)


@pytest.mark.parametrize(
    ("status", "output", "problem"),
    [
        (0, "[ RUN      ] A.B\n========= ERROR SUMMARY: 0 errors\n", None),
        (0, "[ RUN      ] A.B\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", None),
        (99, "[ RUN      ] A.B\n========= Invalid\n========= ERROR SUMMARY: 3 errors\n", "3 errors"),
        (1, "[ RUN      ] A.B\n========= ERROR SUMMARY: 0 errors\n", "status 1"),
        (None, "[ RUN      ] A.B\n[ RUN      ] A.C\n", "cut off after 40 s in case 2"),
        (None, "", "cut off after 40 s in case 0"),
        (0, "========= ERROR SUMMARY: 0 errors\n", "ran no case"),
        (0, "[ RUN      ] A.B\n", "no summary of the sanitizer"),
    ],
)
def test_a_sanitizer_that_looked_at_nothing_has_not_passed(
    status: int | None, output: str, problem: str | None
) -> None:
    from bench.gpu.sanitizer import problem_of

    assert problem_of(status, output) == problem


def test_a_stage_brings_what_it_needs_and_no_more(tmp_path: Path) -> None:
    from bench.gpu.machine import Machine
    from bench.gpu.plan import STAGES, Measuring, parts, wanted

    machine = Machine("card", None, None, tmp_path, tmp_path, False)
    every = parts(machine, Measuring(machine, "tree", "run", [], False))
    assert list(dict.fromkeys(part.stage for part in every)) == list(STAGES)
    before: set[str] = set()
    for part in every:
        assert before.issuperset(part.needs + part.after)
        before.add(part.name)

    def names(stages: list[str], passed: list[str]) -> list[str]:
        return [part.name for part in wanted(every, stages, passed)]

    assert names(["nf4"], []) == ["configure", "compile", "module", "nf4"]
    assert names(["nf4"], ["configure", "compile", "module", "nf4"]) == ["nf4"]
    assert names(["sanitizer"], ["configure", "compile"]) == ["compile-tests", "memcheck", "racecheck"]


def test_a_row_that_ends_its_process_is_a_failed_row(tmp_path: Path) -> None:
    """The next process takes the rows up after it, and those that have begun before come last."""
    from argparse import Namespace

    from bench.compare.interleave import Result
    from bench.gpu.measure import Log, measured

    def log(run: str, again: bool = False) -> Log:
        return Log(Namespace(log=tmp_path / "rows.jsonl", tree="tree", run=run, again=again))

    def never() -> Result:
        raise AssertionError

    first = log("1")
    first.write(begun="a | b")
    first.write(begun="c | d")
    first.write(name="c | d", row={"failed": False})
    result = measured("a | b", never, log("1"))
    assert (result.work, result.against, result.failed) == ("a", "b", True)
    assert result.note == "the process that measured it ended"
    assert (log("1").killed, log("2").killed) == ({"a | b"}, set())
    assert (log("2").done, log("2", again=True).done) == ({"c | d"}, set())
    assert log("2").begun == {"a | b", "c | d"}

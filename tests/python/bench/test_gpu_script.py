"""bench/gpu.sh with stand-ins for all that it starts: which parts run, which do not and why, what a second call does.

tests/gpu_rehearsal.sh runs it with real programs, as far as that goes without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]
CARD = "nvidia_stand_in_1"
PROGRAMS = {
    "nvidia-smi": 'case $1 in *=name) echo "NVIDIA Stand-in 1" ;; *) echo 9.0 ;; esac',
    "nvcc": "echo Cuda compilation tools, release 13.0, V13.0.88",
    "ninja": "",
    "cmake": """
        case "$*" in
          *"--target cuda_test"*) mkdir -p "$2/tests/cpp" && touch "$2/tests/cpp/cuda_test" ;;
        esac""",
    "ctest": '[ "$FAILS" != svd ] || { echo "2/4 Test #2: cuda_test_1 ....***Failed"; exit 8; }',
    "compute-sanitizer": """
        echo "[ RUN      ] Test.Case"
        case "$*" in */GramTest.*) [ "$FAILS" != svd ] || { echo "ERROR SUMMARY: 3 errors"; exit 99; } ;; esac
        echo "ERROR SUMMARY: 0 errors" """,
    "python": """
        case "$*" in
          *bench.gpu.table*) echo "a table" ;;
          *bench.gpu.measure*)
            while [ "$1" != --log ]; do shift; done
            echo "{}" >>"$2" ;;
          *pytest*) echo "3 passed in 1 s" ;;
        esac""",
}


@dataclass
class Machine:
    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        for name, does in PROGRAMS.items():
            path = self.folder / "bin" / name
            path.write_text(f'#!/bin/bash\necho {name} "$@" >>"{self.folder}/asked"\n{does}\n')
            path.chmod(0o755)
        for name in ("GOOGLETEST", "BENCHMARK"):
            (self.folder / name).mkdir()
            (self.folder / name / "CMakeLists.txt").touch()
        for name in ("nf4", "linear", "svd"):
            path = self.folder / "build/cmake/bench/cpp" / f"bench_{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/bash\necho {name}_median 1 ms\n")
            path.chmod(0o755)

    def run(self, *arguments: str, status: int, fails: str = "") -> list[str]:
        """Returns the lines of the summary."""
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "PYTHONPATH")},
            **{f"{name}_DIR": str(self.folder / name) for name in ("GOOGLETEST", "BENCHMARK")},
            **{"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHON": str(self.folder / "bin/python")},
            **{"OUT": str(self.folder / "out"), "FAILS": fails},
        }
        command = ["bash", ROOT / "bench/gpu.sh", "--build", self.folder / "build", *arguments]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
        assert run.returncode == status, run.stdout + run.stderr
        assert not run.stderr
        left = {path.name for path in (self.folder / "out").iterdir()}
        assert left == {f"{CARD}_summary.txt", f"{CARD}_logs.tar.gz"}  # and the rows, of the table's real program
        summary = (self.folder / f"out/{CARD}_summary.txt").read_text().splitlines()
        assert run.stdout.splitlines()[-1] == summary[0]
        return summary

    def asked(self, text: str) -> list[str]:
        """The calls since the last question that contain the text."""
        lines = (self.folder / "asked").read_text().splitlines()
        (self.folder / "asked").write_text("")
        return [line for line in lines if re.search(text, line)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_every_part_runs_and_a_second_call_goes_on(machine: Machine) -> None:
    summary = machine.run(status=1, fails="svd")
    assert summary[0].startswith("FAILED: correctness, cpp-tests (2/4 Test #2: cuda_test_1 ....***Failed)")
    assert "sanitizer, memcheck (error: memcheck Gram: ERROR SUMMARY: 3 errors, status 99" in summary[0]
    ends = [line.partition(",")[0] for line in summary if re.match(r"[a-z0-9]+, [a-z0-9-]+: ", line)]
    assert list(dict.fromkeys(ends)) == [
        *("build", "correctness", "start", "linear", "nf4", "decode", "models", "sanitizer", "profile")
    ]
    assert {"a table", "memcheck Svd: clean", "racecheck Elementwise: clean", "svd_median 1 ms"} <= {*summary}
    with tarfile.open(machine.folder / f"out/{CARD}_logs.tar.gz") as logs:
        assert {f"logs/{name}.log" for name in ("compile", "start", "racecheck-Svd", "pytest-layer")} <= {
            *logs.getnames()
        }
    calls = machine.asked("")
    assert any("-DPISSA_CUDA_ARCHITECTURES=90-real" in call and "-DPISSA_BUILD_TESTS=ON" in call for call in calls)
    assert [call for call in calls if call.endswith("--target cuda_test")]

    assert machine.run(status=0)[0] == "nothing failed"
    assert [call.split()[0] for call in machine.asked("^c[mt]|measure")] == ["cmake", "ctest"]  # its version
    assert machine.run("nf4", "--rows", "M = 1", status=0)[0] == "nothing failed"
    (measured,) = machine.asked("measure|cmake -S|--target")
    assert measured.endswith("--again --seconds 40 --rows=M = 1")


def test_the_tests_that_it_names_exist() -> None:
    script = (ROOT / "bench/gpu.sh").read_text()
    tests = [path.read_text() for path in (ROOT / "tests/cpp").rglob("*_test.cc")]
    (sanitized,) = re.findall(r"SANITIZED='([^']*)'", script)
    for name, cases in (test.split("=") for test in sanitized.split()):
        (text,) = (text for text in tests if f"class {name}Test " in text)
        missing = [case for case in re.findall(r"\w+", cases) if case not in text]
        assert not missing, f"{name}Test has no cases {missing}"
    (first, more) = re.findall(r'names\+?=" ?([a-z0-9_ ]+)"', script)
    for name in (*first.split(), *more.split(), "gpu"):
        assert len([*(ROOT / "tests/python").rglob(f"test_{name}.py")]) == 1


def test_a_row_that_ends_its_process_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process takes the rows up after it, and those that have begun before come last."""
    monkeypatch.syspath_prepend(ROOT)
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

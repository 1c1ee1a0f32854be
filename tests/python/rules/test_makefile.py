"""The Makefile says what there is, and `make t` finds one test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

import makefiles


def test_every_target_is_phony() -> None:
    """A folder of its name, such as docs or bench, would else count as made."""
    listed = re.findall(r"^\.PHONY:((?:.*\\\n)*.*)$", makefiles.TEXT, flags=re.MULTILINE)
    phony = [name for names in listed for name in names.replace("\\", " ").split()]
    assert sorted(phony) == sorted(makefiles.targets())


def test_make_alone_lists_targets_that_exist() -> None:
    first = re.search(r"^([\w-]+):(?!=)", makefiles.FILES[0].read_text(), flags=re.MULTILINE)
    assert first[1] == "help"
    listed = re.findall(r"^# make ((?:[\w-]+, )*[\w-]+) ", makefiles.TEXT, flags=re.MULTILINE)
    names = {name for line in listed for name in line.split(", ")}
    assert {"demo", "test", "quick", "t", "docs", "wheel", "wheels", "nightly", "clean"} <= names <= makefiles.targets()


def test_what_ci_calls_exists() -> None:
    script = (makefiles.ROOT / ".ci/run").read_text()
    lines = [line for line in script.splitlines() if not line.startswith("#")]
    called = [words.split() for line in lines for words in re.findall(r"^ *(?:make|check \S+) ([^\"$]+)", line)]
    names = {name for words in called for name in words if re.fullmatch(r"[\w-]+", name) and name != "-s"}
    assert {"quick", "test", "nightly", "test-arm", "test-peft"} <= names <= makefiles.targets()


def _would_run(test: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("no make")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", "t", f"T={test}"],
        cwd=makefiles.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_one_test_is_found_by_its_file_or_its_name() -> None:
    file = "tests/python/layers/test_kinds.py"
    for words in (file, f"{file}::test_one", f"{file} -k 'dora and conv1d'"):
        assert _would_run(words).rstrip().endswith(f" -m pytest {words}")
    programs = {"GemmTest": "cpu_test", "GemmTest.EverySize": "cpu_test", "CudaDry": "cuda_sim_test"}
    for name, program in {**programs, "CudaSimCapture": "sim_test"}.items():
        printed = _would_run(name)
        assert f"--target {program}\n" in printed
        assert printed.rstrip().endswith(f"/{program} --gtest_filter='{name}*:*/{name}*'")


@pytest.mark.parametrize("name", ["", "tests/python/layers/test_none.py", "GemmTest.NoSuchCase", "README.md"])
def test_what_is_no_test_is_said_before_anything_is_built(name: str) -> None:
    said, leave = _would_run(name).splitlines()
    assert said.startswith(f'echo "T={name}: no file of tests/python, no test of tests/cpp.')
    assert leave == "exit 1"

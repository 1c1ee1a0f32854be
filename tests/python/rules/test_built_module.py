"""What is built: the libraries and symbols that the compiled module needs, its stub, its version, how it imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pissa
from pissa import _C

ROOT = Path(__file__).parents[3]
elf = pytest.mark.skipif(sys.platform == "darwin", reason="tests/wheels/macos.py inspects a module for macOS")


def undefined_symbols() -> list[str]:
    run = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in run.stdout.splitlines()]


@elf
def test_only_the_stable_abi_of_torch_is_used() -> None:
    """C++ names of at, c10 and torch change between releases; the stable ABI is C functions."""
    symbols = undefined_symbols()
    assert any(name.startswith("torch_") for name in symbols)
    bad = [name for name in symbols if re.match(r"_ZN?K?(2at|3c10|5torch|6caffe2)", name)]
    assert not bad


@elf
def test_needed_libraries() -> None:
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert {name for name in needed if name.startswith("libtorch")} == {"libtorch_cpu.so"}
    assert [name for name in needed if re.match("lib(c10|cu|gomp|omp|iomp|python)", name)] == []
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


def test_stub_lists_what_the_module_has() -> None:
    stub = ast.parse((Path(pissa.__file__).parent / "_C.pyi").read_text())
    declared = {node.name: ast.get_docstring(node) for node in stub.body if isinstance(node, ast.FunctionDef)}
    actual = {name: getattr(_C, name).__doc__ for name in dir(_C) if not name.startswith("_")}
    assert declared.keys() == actual.keys()
    for name, doc in declared.items():
        assert " ".join(doc.split()) in " ".join(actual[name].split())  # each file wraps to its own width


def test_the_version_stands_in_pyproject_alone() -> None:
    """CMakeLists.txt reads it there, and builds it into the module, which `pissa.__version__` asks."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"', pyproject, flags=re.MULTILINE).group(1)
    assert version == pissa.__version__
    assert version not in (ROOT / "CMakeLists.txt").read_text()
    minor = ".".join(version.split(".")[:2])
    for example in ("cpp/pissa/pissa.h", "tests/cpp/installed/CMakeLists.txt"):  # what a program asks CMake for
        assert f"find_package(pissa {minor} " in (ROOT / example).read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_imports_quietly_and_without_peft() -> None:
    code = "import sys, pissa; print('peft' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"
    assert run.stderr == ""

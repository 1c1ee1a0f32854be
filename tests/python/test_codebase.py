"""The rules of the code base, each held by a test: layers, sizes, symbols of the built module, types, style."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pissa
from pissa import _C

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder, pattern in [
        ("cpp", "*.h"),
        ("cpp", "*.cc"),
        ("cpp", "*.cu"),
        ("tests/cpp", "*.h"),
        ("tests/cpp", "*.cc"),
        ("bench", "*.h"),
        ("bench", "*.cc"),
    ]
    for path in (ROOT / folder).rglob(pattern)
)
PYTHON = sorted((ROOT / "python").rglob("*.py"))
TEXT = SOURCES + PYTHON + sorted((ROOT / "tests/python").rglob("*.py")) + sorted((ROOT / "bench").rglob("*.py"))
STANDARD_HEADER = re.compile(r"[a-z_]+")

CUDA = ["cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h"]
TORCH = ["torch/csrc/stable/*", "torch/headeronly/*"]
STREAM = "torch/csrc/inductor/aoti_torch/c/shim.h"  # C functions of the stable ABI: the current stream, the allocator

SYSTEM = ["sanitizer/*", "math.h", "pthread.h", "sys/mman.h", "ucontext.h", "unistd.h"]

# Who may include what; see the table in CONTRIBUTING.md. The first pattern that matches a file's path counts.
LAYERS: list[tuple[str, list[str]]] = [
    ("cpp/pissa/core/", ["pissa/core/*"]),
    ("cpp/pissa/cpu/factorize.cc", ["pissa/core/*", "pissa/cpu/*", "Eigen/*"]),
    ("cpp/pissa/cpu/vec.h", ["pissa/core/*", "immintrin.h"]),
    ("cpp/pissa/cpu/", ["pissa/core/*", "pissa/cpu/*"]),
    ("cpp/pissa/cuda/", ["pissa/core/*", "pissa/cuda/*", *CUDA]),
    (
        "cpp/pissa/torch/ops_cuda.cc",
        ["pissa/core/*", "pissa/cuda/*", "pissa/torch/*", "cuda_runtime.h", *TORCH, STREAM],
    ),
    ("cpp/pissa/torch/ops_cpu.cc", ["pissa/core/*", "pissa/cpu/*", "pissa/torch/*", *TORCH]),
    ("cpp/pissa/torch/", ["pissa/core/*", "pissa/torch/*", *TORCH]),
    ("cpp/pissa/python/", ["pissa/core/*", "pissa/cpu/*", "pissa/python/*", "pybind11/*"]),
    (
        "tests/cpp/cuda_sim/",
        ["tests/cpp/cuda_sim", "support/*", "gtest/*", *SYSTEM],
    ),
    ("tests/cpp/", ["pissa/*", "support/*", "tests/cpp/cuda_sim", "gtest/*", *SYSTEM]),
    ("bench/", ["pissa/*", "bench", "cuda_runtime.h", "benchmark/*"]),
]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def is_allowed(header: str, allowed: list[str]) -> bool:
    if STANDARD_HEADER.fullmatch(header):
        return True
    for rule in allowed:
        if (ROOT / rule).is_dir() and (ROOT / rule / header).exists():
            return True
        if rule == header or (rule.endswith("/*") and header.startswith(rule[:-1])):
            return True
    return False


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_cpp_layers(path: Path) -> None:
    source = path.read_text()
    allowed = next(rules for prefix, rules in LAYERS if relative(path).startswith(prefix))
    headers = re.findall(r'#include\s*[<"]([^">]+)[">]', source)
    assert headers or path.suffix == ".h"
    bad = [header for header in headers if not is_allowed(header, allowed)]
    assert not bad, f"{relative(path)} includes {bad}; allowed: the C++ standard library and {allowed}"
    code = without_comments(source)
    if not relative(path).startswith("cpp/pissa/torch/"):
        assert "torch::" not in code
    assert not re.search(r"#pragma omp|\bomp_", code), "threads come from the executor, never from OpenMP"
    if relative(path) != "cpp/pissa/cpu/vec.h":
        assert not re.search(r"\b_mm\d*_", code), "intrinsics live in vec.h"


@pytest.mark.parametrize("path", TEXT, ids=relative)
def test_files_hold_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 520


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no git, or no checkout")
def test_no_path_of_somebody_s_machine_is_committed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|tmp/\w)[/\w]")
    for name in filter(None, tracked):
        path = ROOT / name
        if path.suffix not in (".png", ".bin", ".safetensors") and path.is_file() and path != Path(__file__):
            assert not pattern.search(path.read_text()), name


LEAVES = """
from pathlib import Path

def test_leaves():
    Path("left").mkdir()
    Path("left/README.md").touch()
    Path("changed").write_text("by a test")
    Path("ignored").touch()

def test_last():
    pass
"""


@pytest.mark.parametrize("checkout", [True, False])
def test_tests_that_leave_files_in_the_tree_are_an_error(checkout: bool, tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "python"
    folder.mkdir(parents=True)
    for name in ("conftest.py", "devices.py"):
        shutil.copy(ROOT / "tests/python" / name, folder)
    (folder / "test_it.py").write_text(LEAVES)
    for name in ("there before", "changed"):
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("ignored\n__pycache__/\n")
    if checkout:
        if not shutil.which("git"):
            pytest.skip("git is not installed")
        for command in (["init", "-q"], ["add", "changed"]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(tests, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ("2 passed, 1 error" if checkout else "2 passed in") in run.stdout
    assert (run.returncode != 0) == checkout
    if checkout:
        (summary,) = (line for line in run.stdout.splitlines() if line.startswith("ERROR"))
        assert "test_last" in summary
        assert "write to tmp_path instead: ['?? left/README.md', 'AM changed']" in run.stdout


# ---- The built module ------------------------------------------------------------------------------------------------


def undefined_symbols() -> list[str]:
    run = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in run.stdout.splitlines()]


def test_only_the_stable_abi_of_torch_is_used() -> None:
    """C++ names of at, c10 and torch change between releases; the stable ABI is C functions."""
    symbols = undefined_symbols()
    assert any(name.startswith("torch_") for name in symbols)
    bad = [name for name in symbols if re.match(r"_ZN?K?(2at|3c10|5torch|6caffe2)", name)]
    assert not bad


def test_needed_libraries() -> None:
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert needed - loader == {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


def test_stub_lists_what_the_module_has() -> None:
    stub = ast.parse((Path(pissa.__file__).parent / "_C.pyi").read_text())
    declared = {node.name: ast.get_docstring(node) for node in stub.body if isinstance(node, ast.FunctionDef)}
    actual = {name: getattr(_C, name).__doc__ for name in dir(_C) if not name.startswith("_")}
    assert declared.keys() == actual.keys()
    for name, doc in declared.items():
        assert doc in actual[name]


def test_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"', pyproject, flags=re.MULTILINE).group(1)
    assert f"project(pissa VERSION {version} " in (ROOT / "CMakeLists.txt").read_text()
    assert version == pissa.__version__
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_imports_quietly_and_without_peft() -> None:
    code = "import sys, pissa; print('peft' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"
    assert run.stderr == ""


# ---- Types and style -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["mypy", "--config-file", "pyproject.toml"],
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "python", "tests"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_types_and_style(command: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr

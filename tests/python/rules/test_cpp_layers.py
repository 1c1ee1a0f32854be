"""The layers of the C++: who includes what, and what stays in one place."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
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
# The standard library's and the system's. Intrinsics have a rule of their own.
SYSTEM_HEADER = re.compile(
    r"[a-z_]+|(sys|sanitizer)/\w+\.h|(arm_neon|cpuid|dlfcn|immintrin|math|pthread|ucontext|unistd|windows)\.h"
)

CUDA = ["cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h"]
TORCH = ["torch/csrc/stable/*", "torch/headeronly/*"]
STREAM = "torch/csrc/inductor/aoti_torch/c/shim.h"  # C functions of the stable ABI: the current stream, the allocator

# Who may include what; see the table in CONTRIBUTING.md. The first pattern that matches a file's path counts.
LAYERS: list[tuple[str, list[str]]] = [
    ("cpp/cmake/manylinux.cc", []),
    ("cpp/pissa/pissa.h", ["pissa/core/*", "pissa/cpu/*"]),
    ("cpp/pissa/core/", ["pissa/core/*"]),
    ("cpp/pissa/cpu/factorize.cc", ["pissa/core/*", "pissa/cpu/*", "Eigen/*"]),
    ("cpp/pissa/cpu/vec/", ["pissa/core/*", "pissa/cpu/vec/*"]),
    ("cpp/pissa/cpu/", ["pissa/core/*", "pissa/cpu/*"]),
    ("cpp/pissa/cuda/", ["pissa/core/*", "pissa/cuda/*", *CUDA]),
    (
        "cpp/pissa/torch/ops_cuda.cc",
        ["pissa/core/*", "pissa/cuda/*", "pissa/torch/*", "cuda_runtime.h", *TORCH, STREAM],
    ),
    ("cpp/pissa/torch/ops_cpu.cc", ["pissa/core/*", "pissa/cpu/*", "pissa/torch/*", *TORCH]),
    ("cpp/pissa/torch/", ["pissa/core/*", "pissa/torch/*", *TORCH]),
    ("cpp/pissa/python/", ["pissa/core/*", "pissa/cpu/*", "pissa/python/*", "pybind11/*"]),
    ("tests/cpp/cuda_sim/", ["tests/cpp/cuda_sim", "support/*", "gtest/*"]),
    ("tests/cpp/", ["pissa/*", "support/*", "tests/cpp/cuda_sim", "gtest/*"]),
    ("bench/cpp/", ["pissa/*", "bench/cpp", "cuda_runtime.h", "benchmark/*"]),
]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def is_allowed(header: str, allowed: list[str]) -> bool:
    if SYSTEM_HEADER.fullmatch(header):
        return True
    for rule in allowed:
        if (ROOT / rule).is_dir() and (ROOT / rule / header).exists():
            return True
        if rule == header or (rule.endswith("/*") and header.startswith(rule[:-1])):
            return True
    return False


def test_every_file_includes_what_its_layer_may() -> None:
    bad = []
    for path in SOURCES:
        allowed = next(rules for prefix, rules in LAYERS if relative(path).startswith(prefix))
        headers = re.findall(r'#include\s*[<"]([^">]+)[">]', path.read_text())
        assert headers or path.suffix == ".h", f"{relative(path)}: no includes found"
        bad += [f"{relative(path)}: {header}" for header in headers if not is_allowed(header, allowed)]
    assert not bad, "\n".join(["included against the table of layers (LAYERS):", *bad])


def outside(prefix: str, pattern: str) -> list[str]:
    """The sources, but for those at the prefix, whose code has the pattern."""
    found = (path for path in SOURCES if re.search(pattern, without_comments(path.read_text())))
    return [relative(path) for path in found if not relative(path).startswith(prefix)]


def test_torch_is_known_to_its_layer_only() -> None:
    assert outside("cpp/pissa/torch/", r"torch::") == []


def test_threads_come_from_the_executor_never_from_openmp() -> None:
    assert outside("nowhere", r"#pragma omp|\bomp_") == []


def test_intrinsics_live_in_vec() -> None:
    found = outside("cpp/pissa/cpu/vec/", r"\b_mm\d*_|\b__m\d+|\b(float|u?int)\d+x\d+_t\b")
    assert found == ["tests/cpp/support/emulated_vnni.h"]  # which puts a function in the place of one

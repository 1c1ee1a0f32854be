"""Stands in for the programs that bench/gpu starts on a machine with a GPU: nvidia-smi, nvcc, cmake, ctest,
compute-sanitizer. What each is asked for is appended to the file STAND_IN_LOG; STAND_IN_FAILS names what fails."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

TESTS = ("elementwise", "philox", "nested_scales", "nf4_golden", "gemm_quantized", "weight_gemm", "few_rows", "gemm")
TESTS += ("gram", "eigh", "orthonormalize", "linear", "add_low_rank", "svd")
SMI = {"name": "NVIDIA Stand-in 1", "driver_version": "580.01", "memory.total": "81559 MiB", "compute_cap": "9.0"}


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def install(folder: Path) -> None:
    """Puts the programs into a folder for PATH."""
    for name in ("nvidia-smi", "nvcc", "cmake", "ninja", "ctest", "compute-sanitizer"):
        executable(folder / name, f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')


def nvidia_smi(query: str, *_: str) -> None:
    print(", ".join(SMI.get(field, "?") for field in query.partition("=")[2].split(",")))


def cmake(*arguments: str) -> int:
    if arguments[0] == "--version":
        print("cmake version 4.0.0")
    elif arguments[0] == "-S":
        Path(arguments[3]).mkdir(parents=True, exist_ok=True)
    elif arguments[0] == "--install":
        (core,) = Path(os.environ["STAND_IN_CORE"]).glob("_C*.so")
        target = Path(arguments[arguments.index("--prefix") + 1], "pissa", core.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(core, target)
    elif arguments[2:4] == ("--target", "help"):
        print(*(f"cuda_sim_{name}_test: phony" for name in TESTS), sep="\n")
    else:
        if "compile" in os.environ["STAND_IN_FAILS"]:
            print("[3/9] Building CXX object gemm.cc.o\ncpp/pissa/cuda/gemm.cc:95:3: error: 'blas' was not declared")
            return 1
        for target in arguments[arguments.index("--target") + 1 :]:
            folder = "bench" if target.startswith("bench_") else "tests"
            name = Path(arguments[1], folder, "cpp", target)
            executable(name, "#!/bin/sh\necho 'Benchmark  Time'\necho 'svd_median  1 ms'\n")
    return 0


def ctest() -> int:
    print("    Start 1: cuda_sim_gemm_test\n1/2 Test #1: cuda_sim_gemm_test ....   Passed    0.52 sec")
    print("    Start 2: cuda_sim_svd_test")
    if "svd" not in os.environ["STAND_IN_FAILS"]:
        print("2/2 Test #2: cuda_sim_svd_test .....   Passed    1.20 sec")
        return 0
    print("2/2 Test #2: cuda_sim_svd_test .....***Failed    1.20 sec")
    print(
        "svd_test.cc:12: Failure\n[  FAILED  ] SvdTest.Deterministic (3 ms)\n[  FAILED  ] Sim/SvdTest.FullRank/0 (1 ms)"
    )
    return 8


def compute_sanitizer(*arguments: str) -> None:
    races = arguments[1] == "racecheck"
    print("========= COMPUTE-SANITIZER\n[ RUN      ] Test.Case\n[       OK ] Test.Case (12 ms)")
    summary = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" if races else "ERROR SUMMARY: 0 errors"
    print(f"========= {summary}")


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    with Path(os.environ["STAND_IN_LOG"]).open("a") as log:
        print(program, *rest, file=log)
    if program == "nvcc":
        print("Cuda compilation tools, release 13.0, V13.0.88")
    elif program == "nvidia-smi":
        nvidia_smi(*rest)
    elif program == "compute-sanitizer":
        compute_sanitizer(*rest)
    else:
        sys.exit(cmake(*rest) if program == "cmake" else ctest())

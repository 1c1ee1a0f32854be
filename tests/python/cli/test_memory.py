"""The limits that a command sets for malloc. Each case has its own process, because they cannot be unset."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from pissa.cli.memory import return_freed_blocks

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc.mallinfo2.restype = Mallinfo2
print(return_freed_blocks())
libc.free(libc.malloc(30 << 20))  # by default, malloc then takes blocks of up to 30 MiB from the heap
before = libc.mallinfo2().hblkhd
libc.malloc(10 << 20)
print(libc.mallinfo2().hblkhd - before >= 10 << 20)
for block in [libc.malloc(1 << 20) for _ in range(32)]:
    libc.free(block)
print(libc.mallinfo2().keepcost >= 16 << 20)  # by default, the top of the heap goes back from 128 KiB on
"""


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({}, ["True"] * 3),
        ({"MALLOC_ARENA_MAX": "2"}, ["True"] * 3),
        ({"MALLOC_MMAP_THRESHOLD_": str(32 << 20)}, ["False"] * 3),
        ({"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={32 << 20}"}, ["False"] * 3),
    ],
)
def test_freed_blocks_go_back_unless_the_environment_sets_the_limits(
    variables: dict[str, str], printed: list[str]
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == printed

"""What a command makes of malloc: in a process of its own, for malloc's limits stay."""

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
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split()] + [
        ("others", ctypes.c_size_t * 5)
    ]

libc.mallinfo2.restype = Mallinfo2
print(return_freed_blocks())
libc.free(libc.malloc(30 << 20))  # by default, malloc then takes blocks of up to 30 MiB from the heap
before = libc.mallinfo2().hblkhd
libc.malloc(10 << 20)
print(libc.mallinfo2().hblkhd - before >= 10 << 20)
"""


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({}, ["True", "True"]),
        ({"MALLOC_ARENA_MAX": "2"}, ["True", "True"]),
        ({"MALLOC_MMAP_THRESHOLD_": str(32 << 20)}, ["False", "False"]),
        ({"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={32 << 20}"}, ["False", "False"]),
    ],
)
def test_freed_blocks_go_back_unless_the_environment_sets_the_limits(
    variables: dict[str, str], printed: list[str]
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == printed

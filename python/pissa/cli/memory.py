"""The memory of this process: its peak, and what is free for it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from pissa.system import peak_resident


def peak_memory() -> int:
    """Peak memory so far, in bytes: the memory allocated on a GPU or, without one, the resident memory of this
    process, or what is resident now, where the system does not know the peak."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    now = psutil.Process().memory_info()
    on_windows = int(getattr(now, "peak_wset", 0))  # its working set. Wine has a /proc, but of another process.
    return on_windows or peak_resident() or now.rss


def free_memory() -> int:
    """The bytes that this process can still allocate without swapping: the system's available memory or, in a container
    with a limit (cgroup v2), what is left of the limit if that is less."""
    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such files, or no limit ("max")
        limit, used = (int((group / name).read_bytes()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free

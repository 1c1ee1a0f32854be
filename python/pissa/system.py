"""Calls of the operating system that not all systems have, and what happens where one is missing. Tests take the calls
away on Linux; others run on Windows' Python under Wine. No Mac has been tried."""

from __future__ import annotations

import errno
import mmap
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Python has a name for it since 3.13."""

_LOCKED = (errno.EAGAIN, errno.EACCES, 0)
"""Errors of a lock that another process has: of flock, of Windows, of Wine."""


def allocate(file: int, size: int) -> None:
    """Gives an open file its size on the disk. Without posix_fallocate (macOS, Windows) it only gets its length, and a
    full disk is noticed when the file is written."""
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def read_ahead(file: int, begin: int, size: int) -> None:
    """Asks the system to read a part of an open file from the disk now. Without posix_fadvise (macOS, Windows) it is
    read when it is used."""
    if sys.platform != "darwin" and hasattr(os, "posix_fadvise"):  # so written, mypy knows it on macOS, too
        os.posix_fadvise(file, begin, size, os.POSIX_FADV_WILLNEED)


def map_private(file: int, size: int) -> mmap.mmap:
    """Maps an open file: writable, as torch requires, but private. Without a reserve the system sets no memory aside,
    unless it never promises more than it has. Without MAP_PRIVATE (Windows) it may set aside as much as the file has.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(file, size, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)


def release(mapped: mmap.mmap, begin: int, size: int) -> None:
    """Releases the memory of whole pages of a mapped file. Without MADV_DONTNEED (Windows), the system does so when it
    needs the memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, begin, size)


def lock(file: int) -> bool:
    """Locks an open file until it is closed. Returns False if another process has the lock. Where there are no locks,
    as on some disks, it returns True, and the other process is not noticed."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in _LOCKED
    return True


def flush(file: int) -> None:
    """Brings an open file's content to the disk. Without fdatasync (macOS, Windows) its times are written, too."""
    getattr(os, "fdatasync", os.fsync)(file)


def flush_folder(folder: Path) -> None:
    """Makes new names in a folder durable. Without O_DIRECTORY (Windows) folders cannot be opened, and after a power
    failure the newest names may be missing."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def peak_resident() -> int:
    """Peak of this process's resident memory so far, in bytes. Without /proc (macOS) it is that of getrusage, and
    without that (Windows) 0, for unknown."""
    with suppress(FileNotFoundError):
        return 1024 * int(Path("/proc/self/status").read_text(encoding="ascii").split("VmHWM:")[1].split()[0])
    with suppress(ImportError):  # on Linux, its maximum survives exec: a child would start with that of its parent
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def shell(*words: str) -> str:
    """Words as a command to type. The shells of Windows know no single quotes, but double ones."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def run_instead(program: str, arguments: list[str], environment: Mapping[str, str]) -> int:
    """Runs a program in place of this process, and on Windows below it, and returns its exit status: an exec there ends
    this process with 0 at once, and the program runs on."""
    command = [program, *arguments]
    if sys.platform != "win32":
        os.execve(program, command, environment)
    return subprocess.run(command, env=environment, check=False).returncode


def is_broken_pipe(error: OSError) -> bool:
    """Whether what read the output has ended. Windows says EINVAL."""
    return isinstance(error, BrokenPipeError) or (sys.platform == "win32" and error.errno == errno.EINVAL)


def busy_cores() -> float | None:
    """How many cores programs kept busy in the last minute. Without getloadavg (Windows) it is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

"""What is finished, a line for each unit of work: a run that was killed goes on behind the last line.

A run has one folder, each of its processes a file in it: JSON, one object a line.

    {"boot": "..."}                   first: the start of the system under which the process ran
    {"unit": "...", "result": ...}    a unit whose bytes are in its files
    {"flushed": 5}                    the bytes of the first 5 units of this file are on the disk as well

A killed process leaves its bytes to the system, so every line counts as long as the system has not been started again.
After that, or on another machine, those count that were flushed.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pissa.files.json_file import parse_json, read_object, typed
from pissa.files.messages import printable, shown
from pissa.files.staged import Staged

IDENTITY = "identity.json"

FLUSH_SECONDS = 20.0
"""The work of so many seconds is done again after a power failure. A flush does not hold up the work."""


def begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes the folder of a new run.

    Args:
        identity: of the plan: a value of JSON for each thing that decides what is written.
    """
    with Staged(folder) as staged:
        staged.path(IDENTITY).write_bytes(_text(identity))


def is_of(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the file is that of a run of this identity."""
    return path.is_file() and path.read_bytes() == _text(identity)


def _text(identity: Mapping[str, Any]) -> bytes:
    return (json.dumps(identity, indent=2, allow_nan=False) + "\n").encode()


def check(folder: Path, identity: Mapping[str, Any]) -> None:
    """Checks that the folder is that of a run of this identity.

    Raises:
        ValueError: naming what differs, or a damaged file.
    """
    path = folder / IDENTITY
    remedy = f"remove {folder.parent}, or choose a new folder"
    found = read_object(path, f"To start anew, {remedy}")
    if changed := list(_changes(found, json.loads(json.dumps(identity)))):
        what = "; ".join(f"{name} was {shown(was)}, is {shown(now)}" for name, was, now in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        what = printable(what) + more
        raise ValueError(f"{folder} is of an unfinished run with another plan: {what}: to start anew, {remedy}")


def _changes(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The paths at which two objects differ, with both values; None where there is none."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _changes(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


class Journal:
    """The journal of a run in its folder, and this process's own part of it.

    Args:
        flush: waits until the bytes of all units so far are on the disk; called in a thread of its own.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, flush: Callable[[], None]) -> None:
        self.done: dict[str, Any] = {}
        """The results of the finished units, of all processes before this one was opened, and of this one since."""
        for path in sorted(folder.glob("*.jsonl")):
            self.done |= _read(path)
        self._flush_files = flush
        self._path, self._handle = _new_file(folder)
        self._append({"boot": _boot()})
        self._lock = threading.Lock()
        self._added = 0
        self._flushed = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pissa-journal")
        self._flushing: Future[None] | None = None

    def add(self, unit: str, result: Any) -> None:
        """Notes that a unit is finished, all of whose bytes have been written.

        Args:
            result: a value of JSON.

        Raises:
            OSError: the disk is full, or a flush failed.
        """
        with self._lock:
            self._append({"unit": unit, "result": result})
            self.done[unit] = result
            self._added += 1
            if time.monotonic() - self._flushed >= FLUSH_SECONDS and (self._flushing is None or self._flushing.done()):
                self._wait()
                self._flushing = self._thread.submit(self._flush, self._added)
                self._flushed = time.monotonic()

    def flush(self) -> None:
        """Waits until all units so far are on the disk; raises as `add`."""
        self._wait()
        self._flush(self._added)

    def close(self) -> None:
        """Closes the file. What is not flushed counts all the same, as after a kill."""
        self._thread.shutdown()
        os.close(self._handle)

    def _flush(self, count: int) -> None:
        self._flush_files()
        self._append({"flushed": count})
        os.fdatasync(self._handle)

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()
            self._flushing = None

    def _append(self, line: Mapping[str, Any]) -> None:
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            if os.write(self._handle, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(f"{self._path} cannot be written: {error.strerror}; then the same command goes on") from error


def _new_file(folder: Path) -> tuple[Path, int]:
    for number in itertools.count():
        path = folder / f"{number:06}.jsonl"
        with suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
    raise AssertionError("there is no last number")


def _boot() -> str | None:
    """Another text each time that the system is started; None if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any]:
    """The units that count in a file. Its last line may be torn; behind a line that cannot be read nothing counts."""
    units: list[tuple[str, Any]] = []
    flushed, boot = 0, None
    with open(path, "rb") as file:
        for text in file:
            try:
                line = typed(parse_json(text), dict[str, Any], "a line") if text.endswith(b"\n") else {}
                if "unit" in line:
                    units.append((typed(line["unit"], str, "unit"), line["result"]))
                elif "flushed" in line:
                    flushed = typed(line["flushed"], int, "flushed")
                else:
                    boot = line["boot"]
            except (ValueError, KeyError):
                break
    return dict(units if boot is not None and boot == _boot() else units[: max(flushed, 0)])

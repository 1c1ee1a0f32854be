"""The folder that a run writes: all of it is in a hidden folder until all of it is finished."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from pissa.checkpoints.planned_file import PlannedFile, create, is_finished
from pissa.distributed import agree, rank
from pissa.files.json_file import read_object, reading
from pissa.files.messages import shown
from pissa.files.staged import CompletedError, Staged, check_unused, put_in_place
from pissa.files.tensor_file import Layout
from pissa.notices import UnlockedFolderWarning

UNFINISHED = ".unfinished"
"""The hidden folder."""

IDENTITY = "identity.json"
"""What decides the bytes that a run writes, in the hidden folder."""

FINISHED = ".finished.json"
"""The identity of the run that wrote a folder, in that folder: a second run of it says that nothing is left to do."""


class Output:
    """A folder that is written in batches, by all ranks; an unfinished run of the same identity goes on.

        with Output(folder, identity, layouts) as out:
            for batch in mine:
                if batch not in out.done:
                    out.write("model.safetensors", name, tensor)
                    out.add(batch, result)
            out.finish()

    All ranks enter the block together, inside `distributed.failing_together`, and call `finish` together. Until then
    there is only the hidden folder, which stays after an error or a kill.

    Args:
        identity: of the plan, the same on all ranks: a value of JSON for each thing that decides what is written.
        layouts: the safetensors files, by their names in the folder.

    Raises:
        CompletedError: on all ranks, as they enter the block: the folder holds what a run of this identity wrote.
        ValueError: the folder holds something else, or an unfinished run of another identity, or a run is going on.
        OSError: the disk is full, or cannot be written to.
        RankError: another rank failed.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], layouts: Mapping[str, Layout]) -> None:
        self.folder = folder
        self._identity = identity
        self._layouts = layouts
        self._hidden = folder / UNFINISHED
        self._files = self._hidden / "files"  # under their own names
        self._notes = self._hidden / "done"  # a file of JSON for each finished batch
        self.done: dict[str, Any] = {}
        """The results of the finished batches: of all earlier runs, and of this process."""
        self._open: dict[str, PlannedFile] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pissa-output")
        self._noting: Future[None] | None = None
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Output:
        try:
            if all(agree(self._is_complete())):
                shutil.rmtree(self._hidden, ignore_errors=True)  # of a run that was killed as it ended
                raise CompletedError(f"{self.folder} is complete: an earlier run with the same arguments has ended")
            if rank() == 0:
                self._begin()
            agree()
            if rank() != 0:
                self._lock = _locked(self._hidden, fcntl.LOCK_SH)
                self._check_identity()
            for path in sorted(self._notes.glob("*.json")):
                with reading(path, self._remedy()):
                    self.done[path.stem] = read_object(path)
            agree()  # before the first batch of this run
        except BaseException:
            self._close()
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._unlock()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"{self.folder} cannot be written: {error.strerror}; make room, and the same command goes on"
            ) from error

    def write(self, file: str, name: str, tensor: Tensor, first: int | None = None) -> None:
        """Writes a tensor of the file, or some of its rows; see `PlannedFile.write`."""
        if file not in self._open:
            self._open[file] = PlannedFile(self._files / file, self._layouts[file])
        self._open[file].write(name, tensor, first)

    def add(self, batch: str, result: Mapping[str, Any]) -> None:
        """Notes that all tensors of a batch have been written: as soon as they are on the disk, beside what follows.

        Args:
            result: an object of JSON.

        Raises:
            OSError: the disk is full or fails, at this batch or the one before.
        """
        self._wait()
        self.done[batch] = result
        self._noting = self._thread.submit(self._note, batch, json.dumps(result, allow_nan=False))

    def path(self, name: str) -> Path:
        """Where one rank writes another file, whole, which `finish` will call `name`."""
        path = self._files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> None:
        """Puts all files in place; raises as the class does."""
        self._wait()
        for file in self._open.values():
            file.flush()
        self._close()
        if rank() != 0:
            self._unlock()
        agree()
        if rank() == 0:
            self._place()
            os.replace(self._hidden / IDENTITY, self.folder / FINISHED)
            self._remove()
        agree()

    def discard(self) -> None:
        """Removes what has been written: no run with these arguments can finish. Of one rank, in the block."""
        self._remove()
        with suppress(OSError):  # the folder was there before, or somebody else has put something there
            for path in self._made:
                path.rmdir()

    def _begin(self) -> None:
        """What one rank does: it takes the folder, and makes the files or finds them."""
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        if not self._hidden.exists():
            check_unused(self.folder)
        self._hidden.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self._hidden, fcntl.LOCK_EX)
        new = not (self._hidden / IDENTITY).exists()  # or killed as it began, or when all was in place
        try:
            if new:
                shutil.rmtree(self._files, ignore_errors=True)
                shutil.rmtree(self._notes, ignore_errors=True)
                check_unused(self.folder, besides=UNFINISHED)
            else:
                self._check_identity()
            files = {self._files / name: layout for name, layout in self._layouts.items() if not self._is_placed(name)}
            if not new:
                self._check_whole(files)
            create(files)
            if new:
                with Staged(self._hidden) as staged:
                    staged.path(IDENTITY).write_text(_text(self._identity))
        except BaseException:
            if new:
                self.discard()
            raise
        _take(self._lock, self._hidden, fcntl.LOCK_SH)

    def _is_complete(self) -> bool:
        """Whether a run of this identity has ended, and its files are still there."""
        path = self.folder / FINISHED
        is_mine = path.is_file() and path.read_text() == _text(self._identity)
        return is_mine and all(is_finished(self.folder / name, layout) for name, layout in self._layouts.items())

    def _check_identity(self) -> None:
        """Raises ValueError, naming what differs, if the unfinished run is of another identity."""
        with reading(self._hidden / IDENTITY, self._remedy()):
            found = read_object(self._hidden / IDENTITY)
        if changed := list(_changes(found, json.loads(_text(self._identity)))):
            what = "; ".join(f"{name} was {shown(was)}, is {shown(now)}" for name, was, now in changed[:3])
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{self._hidden} is of an unfinished run with another plan: {what}{more}. {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"To start anew, remove {self._hidden}, or choose a new folder"

    def _is_placed(self, name: str) -> bool:
        """Whether a run was killed after it had put this file in place."""
        return not (self._files / name).exists() and is_finished(self.folder / name, self._layouts[name])

    def _check_whole(self, files: Mapping[Path, Layout]) -> None:
        """Whether the files are there, of which batches may be written: they are older than the identity."""
        for path, layout in files.items():
            if not path.is_file() or path.stat().st_size != layout.size:
                raise ValueError(
                    f"{path} is missing or has not the {layout.size} bytes that this unfinished run gave it: remove "
                    f"{self._hidden} to start anew"
                )

    def _place(self) -> None:
        """Renames all files: config.json, which makes a model of the folder, when the others are there."""
        names = [path.relative_to(self._files) for path in self._files.rglob("*") if path.is_file()]
        names.sort(key=lambda name: (name == Path("config.json"), name.as_posix() not in self._layouts, name))
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        put_in_place({self._files / name: self.folder / name for name in names})

    def _remove(self) -> None:
        """Removes the hidden folder: first what makes a run of it."""
        self._thread.shutdown()
        (self._hidden / IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._unlock()
        shutil.rmtree(self._hidden, ignore_errors=True)  # NFS keeps a file that is open, as the lock was

    def _note(self, batch: str, result: str) -> None:
        for file in list(self._open.values()):  # the other thread may open one meanwhile
            file.flush()
        with Staged(self._notes) as staged:
            staged.path(f"{batch}.json").write_text(result)

    def _wait(self) -> None:
        if self._noting is not None:
            self._noting.result()
            self._noting = None

    def _close(self) -> None:
        self._thread.shutdown()
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, indent=2, allow_nan=False) + "\n"


def _changes(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The paths at which two objects differ, with both values; None where there is none."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _changes(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def _locked(hidden: Path, mode: int) -> int:
    """An open file with the lock of a run. Rank 0 takes it for itself, and then, like the others, shared: a second run
    cannot have it for itself before all of them have ended."""
    handle = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(handle, hidden, mode)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _take(handle: int, hidden: Path, mode: int) -> None:
    try:
        fcntl.flock(handle, mode | fcntl.LOCK_NB)
        taken = os.fstat(handle).st_nlink > 0  # no run has finished and removed it meanwhile
    except BlockingIOError:
        taken = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {hidden.parent} has no locks ({error.strerror}): start no second run into this folder "
            "before this one has ended",
            UnlockedFolderWarning,
            stacklevel=2,
        )
        taken = True
    if not taken:
        raise ValueError(f"another run is writing to {hidden.parent}: wait until it has ended, or choose a new folder")


_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)

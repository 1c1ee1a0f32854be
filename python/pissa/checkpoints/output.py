"""The folder that a run writes: all of it is in a hidden folder until all of it is finished."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from pissa.checkpoints import journal
from pissa.checkpoints.planned_file import PlannedFile, create, is_finished
from pissa.distributed import agree, rank
from pissa.files.safetensors_header import Layout
from pissa.files.staged import CompletedError, check_unused, put_in_place
from pissa.notices import UnlockedFolderWarning

UNFINISHED = ".unfinished"
"""The hidden folder."""

FINISHED = ".finished.json"
"""The identity of the run that wrote a folder, in that folder: a second run of it says that nothing is left to do."""


class Output:
    """A folder that is written unit by unit, by all ranks; an unfinished run of the same identity goes on.

        with Output(folder, identity, layouts) as out:
            for unit in mine:
                if unit not in out.done:
                    out.write("model.safetensors", name, tensor)
                    out.add(unit, result)
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
        self._records = self._hidden / "journal"
        self.done: dict[str, Any] = {}
        """The results of the finished units: of all earlier runs, and of this process."""
        self._journal: journal.Journal | None = None
        self._open: dict[str, PlannedFile] = {}
        self._opening = threading.Lock()
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
                journal.check(self._records, self._identity)
            self._journal = journal.Journal(self._records, self._flush)
            self.done = self._journal.done
            for found in agree(self.done):  # each machine knows which of its own lines count
                self.done |= found
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
        """Writes a tensor of the file, or some of its rows; see `PlannedFile.write`. Any thread may."""
        with self._opening:
            if file not in self._open:
                self._open[file] = PlannedFile(self._files / file, self._layouts[file])
        self._open[file].write(name, tensor, first)

    def add(self, unit: str, result: Any) -> None:
        """Notes that all tensors of a unit have been written; see `Journal.add`."""
        assert self._journal is not None
        self._journal.add(unit, result)

    def path(self, name: str) -> Path:
        """Where one rank writes another file, whole, which `finish` will call `name`."""
        path = self._files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> None:
        """Puts all files in place; raises as the class does."""
        assert self._journal is not None
        self._journal.flush()
        self._close()
        if rank() != 0:
            self._unlock()
        agree()
        if rank() == 0:
            self._place()
            os.replace(self._records / journal.IDENTITY, self.folder / FINISHED)
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
        new = not (self._records / journal.IDENTITY).exists()  # or killed as it began, or when all was in place
        try:
            if new:
                shutil.rmtree(self._files, ignore_errors=True)
                check_unused(self.folder, besides=UNFINISHED)
            else:
                journal.check(self._records, self._identity)
            files = {self._files / name: layout for name, layout in self._layouts.items() if not self._is_placed(name)}
            if not new:
                self._check_whole(files)
            create(files)
            if new:
                journal.begin(self._records, self._identity)
        except BaseException:
            if new:
                self.discard()
            raise
        _take(self._lock, self._hidden, fcntl.LOCK_SH)

    def _is_complete(self) -> bool:
        """Whether a run of this identity has ended, and its files are still there."""
        return journal.is_of(self.folder / FINISHED, self._identity) and all(
            is_finished(self.folder / name, layout) for name, layout in self._layouts.items()
        )

    def _is_placed(self, name: str) -> bool:
        """Whether a run was killed after it had put this file in place."""
        return not (self._files / name).exists() and is_finished(self.folder / name, self._layouts[name])

    def _check_whole(self, files: Mapping[Path, Layout]) -> None:
        """Whether the files are there of which the journal says what is in them: they are older than its identity."""
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
        (self._records / journal.IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._unlock()
        shutil.rmtree(self._hidden, ignore_errors=True)  # NFS keeps a file that is open, as the lock was

    def _flush(self) -> None:
        with self._opening:
            files = list(self._open.values())
        for file in files:
            file.flush()

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


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

"""The folder that a run writes. Everything is in a hidden folder until all of it is finished.

Its safetensors files have their full length and their header from the beginning. Their tensors arrive in any order,
from all ranks, and finished batches are recorded, so that a run that was killed can be continued.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch import Tensor

from pissa.base.digest import bytes_of
from pissa.containers.messages import file_errors, quote, read_object
from pissa.containers.recognise import FINISHED, UNFINISHED
from pissa.containers.staged import CompletedError, check_unused, put_in_place, staged, write_text
from pissa.containers.tensor_file import Layout
from pissa.distributed import agree, rank
from pissa.system import allocate, flush, flush_folder, lock

IDENTITY = "identity.json"
"""The file in the hidden folder that records what determines the bytes of a run."""


class Output:
    """A folder that all ranks write in batches. An unfinished run with the same identity is continued.

        with Output(folder, identity, layouts) as out:
            for batch in mine:
                if batch not in out.done:
                    out.write("model.safetensors", name, tensor)
                    out.add(batch, result)
            out.finish()

    All ranks enter the block together, inside `distributed.failing_together`, and call `finish` together. Until then
    only the hidden folder exists, and it stays after an error or a kill. Every tensor belongs to a batch, and a
    recorded batch is on the disk.

    Args:
        identity: what identifies the plan, the same on all ranks: a JSON value for each thing that determines what is
            written.
        layouts: the safetensors files, by their names in the folder.

    Raises:
        CompletedError: on all ranks, on entering the block: the folder contains what a run of this identity wrote.
        ValueError: the folder contains something else or another identity's unfinished run, or a run is active.
        OSError: the disk is full, or cannot be written to.
        RankError: another rank failed.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], layouts: Mapping[str, Layout]) -> None:
        self.folder = folder
        self._identity = json.dumps(identity, indent=2, allow_nan=False) + "\n"
        self._layouts = layouts
        self._hidden = folder / UNFINISHED
        self._files = self._hidden / "files"  # under their final names
        self._notes = self._hidden / "done"  # a JSON file for each finished batch
        self.done: dict[str, Any] = {}
        """The results of the finished batches: those of all earlier runs, and of this process."""
        self._opened: dict[str, BinaryIO] = {}  # the files that this process writes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pissa-output")
        self._noting: Future[None] | None = None
        self._lock: int | None = None  # an open file, locked by rank 0 for all ranks
        self._made: list[Path] = []

    def check(self) -> None:
        """Raises the ValueErrors of entering the block, but that another run is active. Nothing is changed."""
        if (self._hidden / IDENTITY).exists():
            self._check_identity()
            self._check_whole()
        elif not self._is_complete():
            check_unused(self.folder, besides=UNFINISHED)

    def __enter__(self) -> Output:
        try:
            if all(agree(self._is_complete())):
                shutil.rmtree(self._hidden, ignore_errors=True)  # of a run that was killed while it ended
                raise CompletedError(
                    f"{self.folder} is complete since an earlier run with the same arguments; nothing is written [P080]"
                )
            if rank() == 0:
                self._begin()
            agree()
            self._check_identity()
            for path in sorted(self._notes.glob("*.json")):
                with file_errors(path, self._remedy()):
                    self.done[path.stem] = read_object(path)
            agree()  # before the first batch of this run
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and error.strerror and (is_full or error.filename is None):
            remedy = "; make room, and the same command goes on [P082]" if is_full else ""
            raise OSError(f"{self.folder} cannot be written: {error.strerror}{remedy}") from error

    def write(self, file: str, name: str, tensor: Tensor, member: int | None = None) -> None:
        """Writes a tensor of a file, with the planned dtype and shape, or the matrix with that number in a stack."""
        dtype, shape, offset, _ = self._layouts[file].entries[name]
        if member is not None:
            shape, offset = shape[1:], offset + member * tensor.nbytes
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(
                f"{self._files / file}: tensor {quote(name)}: got {tensor.dtype} {list(tensor.shape)}; planned: "
                f"{dtype} {list(shape)}"
            )
        if file not in self._opened:
            self._opened[file] = open(self._files / file, "rb+", buffering=0)  # noqa: SIM115  closed by _close
        self._opened[file].seek(offset)
        left = bytes_of(tensor.detach().cpu().contiguous())
        while left:
            left = left[os.write(self._opened[file].fileno(), left) :]

    def add(self, batch: str, result: Mapping[str, Any]) -> None:
        """Records that all tensors of a batch have been written, with a JSON object, as soon as they are on the disk.
        This runs in parallel with what follows."""
        self._wait()
        self.done[batch] = result
        self._noting = self._thread.submit(self._note, batch, json.dumps(result, allow_nan=False))

    def path(self, name: str) -> Path:
        """The path where one rank writes a whole additional file, which `finish` renames to `name`."""
        path = self._files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> None:
        """Moves all files to their final places. Raises the errors of the class."""
        self._wait()
        self._close_files()  # Windows renames no open file
        agree()
        if rank() == 0:
            self._place()
            os.replace(self._hidden / IDENTITY, self.folder / FINISHED)
            self._remove()
        agree()

    def discard(self) -> None:
        """Removes what was written: no run with these arguments can finish. One rank calls this, in the block."""
        self._remove()
        with suppress(OSError):  # the folder was there before, or another program has put something there
            for path in self._made:
                path.rmdir()

    def _begin(self) -> None:
        """Runs on one rank: takes the folder, and creates the files or finds them."""
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        if not self._hidden.exists():
            check_unused(self.folder)
        self._hidden.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._hidden / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        if not (lock(self._lock) and os.fstat(self._lock).st_nlink > 0):  # or a run has ended and removed it
            raise ValueError(
                f"another run is writing to {self.folder}: wait until it has ended, or choose a new folder [P081]"
            )
        if (self._hidden / IDENTITY).exists():
            self._check_identity()
            self._check_whole()
            return
        try:  # or an earlier run was killed at its beginning, or when all was in place
            shutil.rmtree(self._files, ignore_errors=True)
            shutil.rmtree(self._notes, ignore_errors=True)
            check_unused(self.folder, besides=UNFINISHED)
            self._allocate()
            with staged(self._hidden) as new:
                write_text(new(IDENTITY), self._identity)
        except BaseException:
            self.discard()
            raise

    def _allocate(self) -> None:
        """Creates the safetensors files with their full size on the disk, so that a full disk is noticed before
        anything is computed."""
        needed, free = sum(layout.size for layout in self._layouts.values()), shutil.disk_usage(self._hidden).free
        for name, layout in self._layouts.items():
            path = self.path(name)
            try:
                with open(path, "wb") as file:
                    allocate(file.fileno(), layout.size)
                    file.write(layout.header)
            except OSError as error:
                raise OSError(
                    f"{path} cannot be written ({error.strerror}): {needed / 1e9:.3g} GB are needed, and "
                    f"{free / 1e9:.3g} GB free there: make room, or take a folder on another disk [P082]"
                ) from error
        for folder in {(self._files / name).parent for name in self._layouts}:
            flush_folder(folder)

    def _is_complete(self) -> bool:
        path = self.folder / FINISHED
        is_mine = path.is_file() and path.read_text(encoding="utf-8") == self._identity
        return is_mine and all(_holds(self.folder / name, layout) for name, layout in self._layouts.items())

    def _check_identity(self) -> None:
        """Raises ValueError, naming what differs, if the unfinished run has another identity."""
        with file_errors(self._hidden / IDENTITY, self._remedy()):
            was = read_object(self._hidden / IDENTITY)
        now = json.loads(self._identity)
        if changed := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
            what = "; ".join(f"{name} was {quote(was.get(name))}, is {quote(now.get(name))}" for name in changed[:3])
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{self._hidden} is of an unfinished run with another plan: {what}{more}. {self._remedy()} [P079]"
            )

    def _check_whole(self) -> None:
        """Raises ValueError unless each file is where the unfinished run created it, or already in place, because
        batches of it may be written."""
        for name, layout in self._layouts.items():
            if not _holds(self._files / name, layout) and not _holds(self.folder / name, layout):
                raise ValueError(
                    f"{self._files / name} is missing or does not have the {layout.size} bytes that this unfinished "
                    f"run gave it: remove {self._hidden} to start anew [P079]"
                )

    def _remedy(self) -> str:
        return f"To start anew, remove {self._hidden}, or choose a new folder"

    def _place(self) -> None:
        """Renames all files. config.json, which makes the folder a model, comes after all others."""
        names = [path.relative_to(self._files) for path in self._files.rglob("*") if path.is_file()]
        names.sort(key=lambda name: (name == Path("config.json"), name.as_posix() not in self._layouts, name))
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        put_in_place({self._files / name: self.folder / name for name in names})

    def _remove(self) -> None:
        """Removes the hidden folder, starting with the files that make it a run."""
        (self._hidden / IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(self._hidden, ignore_errors=True)
        self._close()
        shutil.rmtree(self._hidden, ignore_errors=True)  # NFS keeps a file that is open, as the lock was

    def _note(self, batch: str, result: str) -> None:
        for file in list(self._opened.values()):  # the other thread may open one meanwhile
            flush(file.fileno())
        with staged(self._notes) as new:
            write_text(new(f"{batch}.json"), result)

    def _wait(self) -> None:
        if self._noting is not None:
            self._noting.result()
            self._noting = None

    def _close(self) -> None:
        self._thread.shutdown()
        self._close_files()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close_files(self) -> None:
        for file in self._opened.values():
            file.close()
        self._opened.clear()


def _holds(path: Path, layout: Layout) -> bool:
    """Whether the file exists, with the size and the header of its layout."""
    try:
        with open(path, "rb") as file:
            return path.stat().st_size == layout.size and file.read(len(layout.header)) == layout.header
    except FileNotFoundError:
        return False

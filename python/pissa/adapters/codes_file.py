"""The file with codes in an adapter's folder. Codes that error feedback has found take half a byte for each weight of
the model, and never change. So the folders that a run saves share one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from pissa.adapters.pissa_layout import PISSA_CODES
from pissa.containers.tensor_file import file_state, write_tensors


class CodesFile:
    """The file that a model has written last."""

    def __init__(self) -> None:
        self._path = Path()
        self._state: tuple[int, int, int] | None = None
        self._fingerprints: Mapping[str, str] = {}
        self._digest = ""

    def write(
        self,
        folder: Path,
        new: Callable[[str], Path],
        tensors: Mapping[str, Tensor],
        fingerprints: Mapping[str, str],
    ) -> str:
        """Puts a file with these tensors, whose layers have these fingerprints, into a folder for which `new` gives
        temporary names. It is a hard link to the file that was written last, if that has the same content and is still
        there, unchanged, on a disk with such links. Returns the digest of its header."""
        path = (folder / PISSA_CODES).absolute()
        with suppress(OSError):
            if fingerprints == self._fingerprints and file_state(self._path) == self._state:
                if not (path.exists() and path.samefile(self._path)):
                    os.link(self._path, new(PISSA_CODES))
                    self._path = path
                return self._digest
        temporary = new(PISSA_CODES)
        self._digest = write_tensors(temporary, tensors)
        self._path, self._state, self._fingerprints = path, file_state(temporary), dict(fingerprints)
        return self._digest

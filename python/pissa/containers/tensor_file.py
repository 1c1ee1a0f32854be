"""Safetensors: files, and folders of them. Headers are checked at once, and values are read where they are used. Also
the layout and writing of files."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor

from pissa.base.digest import bytes_of, xxh3, xxh3_of_text
from pissa.containers.messages import file_errors, quote, read_object
from pissa.ops.checks import FLOATS
from pissa.system import map_private, read_ahead, release

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtype for each dtype of the format that has elements of whole bytes, in the order in which safetensors writes
them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SAVED_FLOATS = (*FLOATS, torch.float64)
"""The dtypes in which a file may store real numbers."""

_METADATA = "__metadata__"
"""The entry of a header that is not a tensor."""

_CHECKSUMS = "xxh3"
"""The entry in a file's metadata with the XXH3-128 of each tensor, in the order of their names."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
"""The extensions of files that contain, or list, the weights of a model."""

_SHARD = re.compile(r"[^/]+\.safetensors")
"""The name of a file in the same folder. Shards that are written have such names too."""


class Entry(NamedTuple):
    """The place and kind of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """The offset of its first byte in the file."""
    nbytes: int


# ---- A file ----------------------------------------------------------------------------------------------------------


class MappedFile:
    """A mapped file of tensors, of which a class derived from this one reads the header. The mapping is private to this
    process, so writing to a tensor by mistake changes a copy, never the file.

    The file must not become shorter, because the system kills a process (SIGBUS) that reads a page which no longer
    exists. `view` checks the file immediately before. Nothing can check it afterwards.
    """

    remedy: str
    """The end of errors about the file: how to continue."""
    entries: dict[str, Entry]
    """The tensors, in the order of their positions in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isfile(path):  # a pipe would block
            what = "not a regular file" if os.path.exists(path) else "missing"
            if os.path.islink(path):
                what = f"a link to {os.readlink(path)}, which is {what}"
            pickle = path.with_suffix(".bin")
            beside = f" ({pickle.name} next to it is a pickle, which is never read)" if os.path.lexists(pickle) else ""
            raise ValueError(f"{path} is {what}: download or copy it again{beside} [P085]")
        with file_errors(path, self.remedy):
            self._check()
            self._state = file_state(path)
        self._map = _map_file(path, self._state[0])

    def _check(self) -> None:
        """Checks the file before it is mapped. The caller's block is one of `file_errors`."""

    @contextmanager
    def _header_errors(self) -> Iterator[None]:
        """`file_errors` for the block that reads the mapped header. A file that is refused is mapped no longer: while
        the error is shown, as in a notebook, Windows would let no copy take its place."""
        try:
            with file_errors(self.path, self.remedy):
                yield
        except Exception:
            self._map.close()
            raise

    @property
    def digest(self) -> str:
        """The XXH3-128 of the header."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """The file's size, its modification time, and the digest of its header."""
        size, changed, _ = self._state
        return f"{size} bytes, {changed} ns, {self.digest}"

    def view(self, name: str) -> Tensor:
        """Returns the tensor, whose values are those of the mapped file. It is a copy if it is not aligned to its
        elements in the file.

        It must not be written to. It keeps the mapping alive.
        """
        with file_errors(self.path, self.remedy):
            state = file_state(self.path)
        if state != self._state:
            raise OSError(f"{self.path} has changed since it was opened: start again when nobody writes to it [P085]")
        dtype, shape, offset, nbytes = self.entries[name]
        with file_errors(self.path, self.remedy):
            if nbytes == 0:
                return torch.empty(shape, dtype=dtype)
            content = torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)
            return (content.clone() if offset % dtype.itemsize else content).view(dtype).view(shape)

    def release(self, names: Sequence[str]) -> None:
        """Releases the memory of these tensors' pages. They are read again when they are next used. A page that also
        belongs to a tensor not named stays."""
        for begin, end in self._ranges(names):
            begin += -begin % mmap.PAGESIZE
            end -= end % mmap.PAGESIZE if end < len(self._map) else 0
            if begin < end:
                release(self._map, begin, end - begin)

    def ahead(self, names: Sequence[str]) -> None:
        """Asks the system to read these tensors from the disk now. Returns at once."""
        # madvise would do the same but block Python's other threads.
        with suppress(OSError), open(self.path, "rb") as file:
            for begin, end in self._ranges(names):
                read_ahead(file.fileno(), begin, end - begin)

    def _ranges(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """The bytes of these tensors, in as few ranges as possible."""
        ranges: list[tuple[int, int]] = []
        for entry in sorted((self.entries[name] for name in names), key=lambda entry: entry.offset):
            begin, end = entry.offset, entry.offset + entry.nbytes
            if ranges and ranges[-1][1] == begin:
                begin, _ = ranges.pop()
            ranges.append((begin, end))
        return ranges


class TensorFile(MappedFile):
    """A mapped safetensors file."""

    remedy = "It is damaged, incomplete or no safetensors file: download or copy it again [P085]"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._header_errors():
            start = 8 + int.from_bytes(self._map[:8], "little")
            self._header = self._map[8:start].decode()
            header = json.loads(self._header)
            self.metadata: dict[str, str] = header.pop(_METADATA, None) or {}
            """What the file says in addition to its tensors."""
            checksums = self.metadata.get(_CHECKSUMS, "").split()
            self.entries = _entries(header, start)
        is_complete = len(checksums) == len(self.entries)
        self._checksums = dict(zip(sorted(self.entries), checksums, strict=True)) if is_complete else None

    def _check(self) -> None:
        # safetensors checks that offsets, shapes and dtypes fit each other and the file.
        cast(Any, safe_open)(self.path, "numpy").__exit__(None, None, None)

    @property
    def digest(self) -> str:
        """The XXH3-128 of the header and so, where that has checksums, of all that the file says."""
        return xxh3_of_text(self._header)

    def expect(self, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], demand: str) -> None:
        """Checks that the file has a tensor with that shape and one of these dtypes. `demand` is the part of the model
        that needs it."""
        if name not in self.entries:
            raise ValueError(f"{self.path}: tensor {quote(name)} is missing, of {demand}")
        dtype, stored = self.entries[name].dtype, list(self.entries[name].shape)
        if dtype not in dtypes or stored != list(shape):
            allowed = " or ".join(map(str, dtypes))
            raise ValueError(
                f"{self.path}: tensor {quote(name)} is {dtype} {stored}, expected {allowed} {list(shape)}, "
                f"for {demand} [P057]"
            )

    def expect_checksums(self) -> None:
        """Raises ValueError, naming the file, unless it has a checksum for every tensor."""
        if self._checksums is None:
            raise ValueError(
                f"{self.path} has no checksums of its {len(self.entries)} tensors: save_pretrained did not write it; "
                "save the adapter again, or take the file from a copy [P058]"
            )

    def read(self, name: str) -> Tensor:
        """Returns a copy of the tensor, after checking that it matches its checksum and is finite."""
        tensor = self.view(name).clone()
        if self._checksums is not None and xxh3(tensor) != self._checksums[name]:
            raise ValueError(
                f"{self.path}: tensor {quote(name)} is damaged: its checksum is not the one that was written; save "
                "the adapter again, or take the file from a copy [P058]"
            )
        values = tensor if tensor.dtype in SAVED_FLOATS else tensor.float()  # torch cannot check float8
        if tensor.is_floating_point() and not torch.isfinite(values).all():
            raise ValueError(f"{self.path}: tensor {quote(name)} holds NaN or Inf [P058]")
        return tensor


def file_state(path: Path) -> tuple[int, int, int]:
    """Size, modification time and number of a file. Different values later show that it was written to, or replaced."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _map_file(path: Path, size: int) -> mmap.mmap:
    with open(path, "rb") as file:
        try:
            return map_private(file.fileno(), size)
        except OSError as error:
            how = (
                f"{error.strerror}: the file, {size:,} bytes, cannot be mapped. If `sysctl vm.overcommit_memory` is 2, "
                "the system sets that much memory aside: set it to 0, or add swap; otherwise, raise `ulimit -v` [P083]"
            )
            raise OSError(error.errno, how, str(path)) from error


def _entries(header: Mapping[str, Any], start: int) -> dict[str, Entry]:
    """The tensors of a header, in the order of their positions in the file, of which the first is at `start`."""
    entries = {}
    for name, fields in header.items():
        if (dtype := DTYPES.get(fields["dtype"])) is None:
            raise ValueError(f"tensor {quote(name)} has the dtype {fields['dtype']!r}; known: {', '.join(DTYPES)}")
        begin, end = fields["data_offsets"]
        entries[name] = Entry(dtype, tuple(fields["shape"]), start + begin, end - begin)
    return dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))


# ---- A folder --------------------------------------------------------------------------------------------------------


class Source:
    """The tensors of a checkpoint by name: those of `model.safetensors`, or of an index with its shards. The files stay
    mapped as long as this object or a tensor is in use."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.index = _index(self.folder)
        """The path of the index, if the checkpoint has one."""
        self._files: dict[Path, MappedFile] = {}
        self._holders: dict[str, MappedFile] = {}
        promises = {WEIGHTS: set[str]()} if self.index is None else shards(self.index)
        for name, promised in sorted(promises.items()):
            file = TensorFile(self.folder / name)
            if lacking := sorted(promised - file.entries.keys()):
                raise ValueError(
                    f"{file.path}: tensor {quote(lacking[0])} is missing, which {INDEX} says is there: the files do "
                    "not belong together; download or copy them again [P085]"
                )
            if twice := sorted(file.entries.keys() & self._holders.keys()):
                other = self._holders[twice[0]]
                raise ValueError(
                    f"{file.path}: tensor {quote(twice[0])} is in {other.path.name} too: the files do not belong "
                    "together; download or copy them again"
                )
            self._files[file.path] = file
            self._holders |= dict.fromkeys(file.entries, file)

    @property
    def names(self) -> list[str]:
        """The names of all tensors, file by file, in the order of their positions."""
        return list(self._holders)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return list(self._files)

    def path_of(self, name: str) -> Path:
        return self._holder(name).path

    def written_as(self, path: Path) -> str:
        """The name of the safetensors file that has the tensors of one of the files in a new checkpoint."""
        return path.name

    def entry(self, name: str) -> Entry:
        """The tensor's place, its dtype and its shape."""
        return self._holder(name).entries[name]

    def identity(self) -> dict[str, str]:
        """For each file its size, its modification time, and a fingerprint of its header."""
        return {path.name: file.identity for path, file in self._files.items()}

    def read(self, name: str, member: int | None = None) -> Tensor:
        """The tensor, or the one with that number in a stack; see `MappedFile.view`."""
        tensor = self._holder(name).view(name)
        return tensor if member is None else tensor[member]

    def release(self, names: Sequence[str]) -> None:
        """Releases the memory of these tensors' pages; see `MappedFile.release`."""
        for file in self._holding(names):
            file.release([name for name in names if name in file.entries])

    def ahead(self, names: Sequence[str]) -> None:
        """Asks the system to read these tensors from the disk now. Returns at once."""
        for file in self._holding(names):
            file.ahead([name for name in names if name in file.entries])

    def _holder(self, name: str) -> MappedFile:
        if name not in self._holders:
            raise ValueError(f"{self.folder} has no tensor {quote(name)}")
        return self._holders[name]

    def _holding(self, names: Sequence[str]) -> set[MappedFile]:
        return {self._holder(name) for name in names}


def _index(folder: Path) -> Path | None:
    """The path of the index; None if there is one file, model.safetensors."""
    needed = f"needed: a folder with {WEIGHTS}, or with {INDEX} and its shards"
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.lexists(folder) else "is missing"
        raise ValueError(f"{folder} {what}; {needed}; a model of the Hub is downloaded first")
    if os.path.lexists(folder / WEIGHTS):
        return None
    if not os.path.lexists(folder / INDEX):
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHT_FILES))
        what = f", but {', '.join(names[:3])}" if names else ""
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}{what}; {needed}; or a GGUF file. Pickles are never read: "
            "take a revision with safetensors [P084]"
        )
    return folder / INDEX


def has_safetensors(folder: Path) -> bool:
    """Whether a model's folder has weights that a `Source` reads."""
    return any(os.path.lexists(folder / name) for name in (WEIGHTS, INDEX))


def shards(index: Path) -> dict[str, set[str]]:
    """The shards that the index names, each with the tensors that should be in it."""
    with file_errors(index, "It is damaged: download or copy it again [P085]"):
        files = dict(read_object(index)["weight_map"])
        if not all(isinstance(file, str) for file in files.values()):
            raise ValueError("weight_map has something else than names of files")
        if not files:
            raise ValueError("weight_map names no tensor")
    tensors: dict[str, set[str]] = {}
    for name, file in files.items():
        if not _SHARD.fullmatch(file):
            raise ValueError(
                f"{index} says that tensor {quote(name)} is in {quote(file)}; allowed: a .safetensors file in the same "
                "folder: download or copy the index again"
            )
        tensors.setdefault(file, set()).add(name)
    return tensors


# ---- Writing ---------------------------------------------------------------------------------------------------------


class Layout:
    """The positions of a file's tensors, given by their dtypes and shapes. dtypes of large elements come first, so that
    each tensor is aligned to its elements without holes, which the format forbids. Those of one size keep the given
    order."""

    def __init__(
        self, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        header: dict[str, Any] = {}
        end = 0
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name]
            if dtype not in _NAMES or name == _METADATA:
                raise ValueError(f"tensor {quote(name)}, {dtype}, has no place in a safetensors file")
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        described = {_METADATA: {"format": "pt"} | dict(metadata or {})} | header
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self.header = len(text).to_bytes(8, "little") + text
        """The first bytes of the file."""
        self.entries = _entries(header, len(self.header))
        """The tensors, in the order of their positions in the file."""
        self.size = len(self.header) + end
        """The number of bytes in the file."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Writes a safetensors file with checksums: the same bytes for the same tensors, in safetensors' order. Each tensor
    is taken from the mapping twice, one at a time. An existing file is replaced, because the tensors may be views of
    it. Returns the digest of its header; see `TensorFile.digest`."""
    layout_of, checksums = {}, []
    for name in sorted(tensors):
        tensor = tensors[name]
        layout_of[name] = tensor.dtype, tuple(tensor.shape)
        checksums.append(xxh3(tensor))
    order = sorted(layout_of, key=lambda name: list(DTYPES.values()).index(layout_of[name][0]))
    layout = Layout({name: layout_of[name] for name in order}, {_CHECKSUMS: " ".join(checksums), **(metadata or {})})
    path.unlink(missing_ok=True)  # not overwritten, because the tensors may be views of it
    with open(path, "wb") as file:
        file.write(layout.header)
        for name in layout.entries:
            file.write(bytes_of(tensors[name].detach().cpu().contiguous()))
    return xxh3_of_text(layout.header[8:].decode())


class Scratch(Mapping[str, Tensor], AbstractContextManager["Scratch"]):
    """Tensors that are kept on a folder's disk until all of them are known. Each is read when it is requested. Their
    file has no name, so it disappears when the block or the process ends."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Stores the values of contiguous tensors on the CPU."""
        for name, tensor in tensors.items():
            self._places[name] = self._file.seek(0, os.SEEK_END), tensor.dtype, tuple(tensor.shape)
            self._file.write(bytes_of(tensor))

    def __getitem__(self, name: str) -> Tensor:
        place, dtype, shape = self._places[name]
        content = torch.empty(shape, dtype=dtype)
        self._file.seek(place)
        self._file.readinto(bytes_of(content))
        return content

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __exit__(self, *_: object) -> None:
        self._file.close()

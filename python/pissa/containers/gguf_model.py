"""The weights of a GGUF file by transformers' names: views of the mapped file, except those of which llama.cpp stores
other values or another order. Rows can be moved in codes too, because no block of codes crosses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pissa import ops
from pissa.containers.coded_weights import CodedWeight
from pissa.containers.gguf_config import ARCHITECTURES, Architecture, architecture_of
from pissa.containers.gguf_file import GgufFile
from pissa.containers.messages import file_errors, quote
from pissa.containers.tensor_file import WEIGHTS, Entry, Source
from pissa.ops.formats import QuantFormat

Change = Callable[..., Tensor]
"""Makes a tensor of transformers of those that a file stores, floats or the bytes of codes: another order and shape."""


class OtherValues(NamedTuple):
    """How a file stores other values than those of transformers."""

    read: Callable[[Tensor], Tensor]
    written: Callable[[Tensor], Tensor]
    """The inverse of `read`."""


_ONE_MORE = OtherValues(lambda norm: norm.float() - 1, lambda norm: norm.float() + 1)
_DECAY = OtherValues(lambda decay: torch.log(-decay.float()), lambda logarithm: -torch.exp(logarithm.float()))


class Assembly(NamedTuple):
    """The stored tensors that make one of transformers', and what is done with them."""

    tensors: tuple[str, ...]
    change: Change | None = None
    other_values: OtherValues | None = None
    is_transposed: bool = False
    """Whether a dense weight is the transposed one. Codes are never transposed."""
    is_decoded: bool = False
    """Whether codes are decoded first, because the change crosses their blocks."""


class Place(NamedTuple):
    """Where a file stores a matrix of transformers, or a stack of them."""

    tensors: dict[str, int]
    """The stored tensors, and the number of rows of each."""
    rows: Tensor | None
    """For each row the number of the stored one, counted through all tensors; None if they are in order."""
    columns: Tensor | None
    """The same for columns."""


class GgufSource(Source):
    """The tensors of a model in GGUF files by transformers' names, in the shapes of the dense model. Those in codes are
    uint8 [..., out, bytes of a row]."""

    def __init__(self, files: Sequence[GgufFile], model: PreTrainedModel) -> None:
        self.folder = files[0].path
        self.index = None if len(files) == 1 else self.folder
        self._files = {file.path: file for file in files}
        self._holders = {name: file for file in files for name in file.entries}
        self._formats = {name: format for file in files for name, format in file.formats.items()}
        if len(self._holders) < sum(len(file.entries) for file in files):
            raise ValueError(f"{self.folder}: its parts have a tensor of the same name: they do not belong together")
        self._assemblies = _assemblies(files[0], model, list(self._holders))
        expected = model.state_dict()
        for name in self._assemblies:
            with file_errors(self.path_of(name), "Metadata and tensors contradict each other: take another file"):
                if (shape := self.shape(name)) != expected[name].shape:
                    tensors = " and ".join(map(quote, self._assemblies[name].tensors))
                    needed = f"{name} of the model is {list(expected[name].shape)}"
                    raise ValueError(f"{tensors} make {list(shape)}, and {needed}")

    @property
    def names(self) -> list[str]:
        return list(self._assemblies)

    @property
    def stored_names(self) -> list[str]:
        """llama.cpp's names of all tensors."""
        return list(self._holders)

    def path_of(self, name: str) -> Path:
        return super().path_of(self._assembly(name).tensors[0])

    def written_as(self, path: Path) -> str:
        number, count = list(self._files).index(path), len(self._files)
        return WEIGHTS if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the dense tensor."""
        stored, format, assembly = self.entry(name).shape, self._format(name), self._assembly(name)
        if format is None:
            return stored
        *stack, rows, row = stored
        columns = row // format.block_bytes * format.usual_blocksize
        return (*stack, columns, rows) if assembly.is_transposed else (*stack, rows, columns)

    def columns(self, name: str) -> int:
        """The columns of the stored matrix, or of each in a stack."""
        return self.shape(name)[-2 if self._assembly(name).is_transposed else -1]

    def entry(self, name: str) -> Entry:
        entries = [Source.entry(self, stored) for stored in self._assembly(name).tensors]
        made = self._make(name, [torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries])
        return Entry(made.dtype, tuple(made.shape), entries[0].offset, sum(entry.nbytes for entry in entries))

    def read(self, name: str, member: int | None = None) -> Tensor:
        return self._make(name, [Source.read(self, stored, member) for stored in self._assembly(name).tensors])

    def place(self, name: str) -> Place:
        """Where the named matrix is stored."""
        assembly = self._assembly(name)
        tensors = {stored: (1, *Source.entry(self, stored).shape)[-2] for stored in assembly.tensors}
        if assembly.change is None:
            return Place(tensors, None, None)
        if assembly.is_decoded:
            return Place(tensors, None, assembly.change(torch.arange(self.shape(name)[-1])[None]).flatten())
        numbers = torch.split(torch.arange(sum(tensors.values()))[:, None], list(tensors.values()))
        return Place(tensors, assembly.change(*numbers).flatten(), None)

    def stored_rows(self, name: str, matrix: Tensor, member: int | None) -> Iterator[tuple[Path, int, Tensor]]:
        """The inverse of `read` for a matrix, or one of a stack, in codes or in the dtype of the file: for each stored
        tensor its file, the position of the bytes there, and these.

        Raises:
            ValueError: the file stores other values than the matrix's rows.
        """
        assembly = self._assembly(name)
        is_matrix = member is not None or len(Source.entry(self, assembly.tensors[0]).shape) == 2
        if assembly.is_decoded or not is_matrix:
            raise ValueError(f"{self.folder}: {name} is not stored in rows")
        place = self.place(name)
        rows = matrix.reshape(self.shape(name)[-1 if assembly.is_transposed else -2], -1)
        stored = rows if place.rows is None else torch.empty_like(rows).index_copy_(0, place.rows, rows)
        parts = torch.split(stored, list(place.tensors.values()))
        for tensor, part in zip(place.tensors, parts, strict=True):
            yield Source.path_of(self, tensor), Source.entry(self, tensor).offset + (member or 0) * part.nbytes, part

    def stored_values(self, name: str, values: Tensor) -> Iterator[tuple[Path, int, Tensor]]:
        """The same for a whole tensor in the dtype of the file."""
        assembly = self._assembly(name)
        entries = [Source.entry(self, stored) for stored in assembly.tensors]
        if assembly.other_values is not None:
            values = assembly.other_values.written(values)
        if assembly.change is None:
            parts: Sequence[Tensor] = [values]
        else:
            numbers = torch.arange(values.numel())
            places = [part.view(entry.shape) for part, entry in zip(_split(numbers, entries), entries, strict=True)]
            order = assembly.change(*places).flatten()
            parts = _split(torch.empty_like(values).flatten().index_copy_(0, order, values.flatten()), entries)
        for stored, entry, part in zip(assembly.tensors, entries, parts, strict=True):
            yield Source.path_of(self, stored), entry.offset, part.to(entry.dtype)

    def release(self, names: Sequence[str]) -> None:
        super().release([stored for name in names for stored in self._assembly(name).tensors])

    def ahead(self, names: Sequence[str]) -> None:
        super().ahead([stored for name in names for stored in self._assembly(name).tensors])

    def coded(self, dtype: torch.dtype) -> dict[str, CodedWeight]:
        """The weights that are codes. `dtype` is that in which they are decoded."""
        formats = {name: format for name in self.names if (format := self._format(name)) is not None}
        return {
            name: GgufWeight(self, {"codes": name}, dtype, format, self._assembly(name).is_transposed)
            for name, format in formats.items()
        }

    def _assembly(self, name: str) -> Assembly:
        if name not in self._assemblies:
            raise ValueError(f"{self.folder} has no tensor {quote(name)}")
        return self._assemblies[name]

    def _format(self, name: str) -> QuantFormat | None:
        """The format of a tensor in codes; None for one that is read dense."""
        assembly = self._assembly(name)
        return None if assembly.is_decoded else self._formats.get(assembly.tensors[0])

    def _make(self, name: str, tensors: list[Tensor]) -> Tensor:
        """A tensor of transformers, of the stored ones."""
        assembly = self._assembly(name)
        format, *others = {self._formats.get(stored) for stored in assembly.tensors}
        if others:
            raise ValueError(f"{' and '.join(map(quote, assembly.tensors))}, which make {name}, are of different types")
        if assembly.is_decoded and format is not None:
            weight = _weight(tensors[0], format)
            is_meta = tensors[0].is_meta
            tensors = [torch.empty(weight.shape, device="meta") if is_meta else ops.dequantize(weight)]
        made = tensors[0] if assembly.change is None else assembly.change(*tensors)
        if assembly.other_values is not None:
            made = assembly.other_values.read(made)
        return made.mT if assembly.is_transposed and format is None else made


def _split(flat: Tensor, entries: Sequence[Entry]) -> Sequence[Tensor]:
    return torch.split(flat, [math.prod(entry.shape) for entry in entries])


def _weight(codes: Tensor, format: QuantFormat) -> ops.QuantizedWeight:
    rows, row = codes.shape
    shape = (rows, row // format.block_bytes * format.usual_blocksize)
    scales = torch.empty(0, dtype=torch.uint8)  # they are among the codes
    return ops.QuantizedWeight(codes.reshape(-1), scales, None, None, format.name, shape, format.usual_blocksize)


@dataclass(frozen=True)
class GgufWeight(CodedWeight):
    """A weight, or a stack of them, in blocks of a GGUF file."""

    format: QuantFormat
    transposes: bool

    @property
    def is_stack(self) -> bool:
        return len(self.shape) == 3

    @property
    def is_transposed(self) -> bool:
        return self.transposes

    @property
    def shape(self) -> tuple[int, ...]:
        return cast(GgufSource, self.source).shape(self.codes)

    def _quantized(self, parts: Mapping[str, Tensor]) -> ops.QuantizedWeight:
        return _weight(parts["codes"], self.format)


# ---- Which tensors make each of transformers' ------------------------------------------------------------------------

_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that config.json has."""


def _assemblies(file: GgufFile, model: PreTrainedModel, stored: Sequence[str]) -> dict[str, Assembly]:
    """The assemblies of the model's tensors by name, in the order of the files. A tied tensor is there once.

    Raises:
        ValueError: the file has a tensor for which the model has no place.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture, config = file.metadata["general.architecture"], model.config.get_text_config()
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(number, config.num_hidden_layers)
    made, places = architecture_of(file), {name: place for place, name in enumerate(stored)}
    assemblies: dict[str, Assembly] = {}
    for name, parameter in model.state_dict().items():
        if (tensors := _tensors_of(name, table, places)) and tensors[0] in places:
            change = _change(name, len(tensors), made, config, parameter.shape)
            is_transposed = _is_transposed(name, made)
            is_decoded = change is not None and "out_proj" in name
            assemblies[name] = Assembly(tensors, change, _other_values(name, made), is_transposed, is_decoded)
    # Blocks that predict further tokens come after the others, and transformers has none.
    key = f"{architecture}.nextn_predict_layers"
    count = _number_of_blocks(file, key, file.metadata.get(key, 0), len(stored))
    further = tuple(f"blk.{config.num_hidden_layers + number}." for number in range(count))
    # Layers that share the keys and values of others have none in transformers, and in many files they do.
    sharing = getattr(config, "num_kv_shared_layers", 0)
    first = config.num_hidden_layers - _number_of_blocks(file, "shared_kv_layers", sharing, config.num_hidden_layers)
    shared = [f"blk.{number}.attn_" for number in range(first, config.num_hidden_layers)]
    further += tuple(f"{block}{part}.weight" for block in shared for part in ("k", "k_norm", "v"))
    used = {tensor for assembly in assemblies.values() for tensor in assembly.tensors}
    if unused := [name for name in stored if name not in (*used, *_ROPE) and not name.startswith(further)]:
        raise ValueError(
            f"{file.path}: {len(unused)} tensors, {quote(unused[0])} the first, have no place in a "
            f"{type(model).__name__} of {config.num_hidden_layers} layers: the model is of another kind than "
            f"{architecture} as transformers knows it; take a checkpoint of it in safetensors"
        )
    return dict(sorted(assemblies.items(), key=lambda item: places[item[1].tensors[0]]))


def _is_transposed(name: str, made: Architecture) -> bool:
    return made.transposes_experts and name.endswith((".gate_up_proj", ".down_proj"))


def stored_shapes(model: PreTrainedModel, architecture: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a new file of the model, by llama.cpp's names. A tied tensor is there once.

    Raises:
        ValueError: llama.cpp has no name for a parameter of the model.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config.get_text_config()
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(number, config.num_hidden_layers)
    stems = {stem for _, stem in table.mapping.values()}
    stems -= {stem.replace("gate", "gate_up") for stem in stems if stem.endswith("gate_exps")}  # two tensors, as usual
    bare = {stem for stem in stems if stem.endswith(".ssm_a")}
    possible = {f"{stem}.{leaf}": 0 for stem in stems - bare for leaf in ("weight", "bias", "scale")}
    possible |= dict.fromkeys(bare, 0)
    made, shapes = ARCHITECTURES[architecture], dict[str, tuple[int, ...]]()
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors = _tensors_of(name, table, possible)
        if not tensors or not possible.keys() >= set(tensors):
            raise ValueError(f"llama.cpp's {architecture} has no name for {name}")
        shape = tuple(parameter.mT.shape if _is_transposed(name, made) else parameter.shape)
        if len(tensors) == 2:  # gate and up of experts
            halved = -1 if name.endswith("_bias") else -2
            shape = tuple(size // 2 if axis - len(shape) == halved else size for axis, size in enumerate(shape))
        if name.endswith(("shared_expert_gate.weight", "conv.weight", "conv1d.weight")):
            shape = tuple(size for size in shape if size > 1)
        shapes |= dict.fromkeys(tensors, shape)
    return shapes


def _number_of_blocks(file: GgufFile, key: str, value: object, most: int) -> int:
    """The value, which the file or its configuration has under that key."""
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{file.path}: {key} is {quote(value)}; needed: a number of blocks, up to {most}")
    return value


def _tensors_of(name: str, table: Any, stored: Mapping[str, int]) -> tuple[str, ...]:
    """The stored tensors of a parameter; empty if there are none."""
    name = name.replace(".dt_bias", ".dt_proj.bias").replace("router.scale", "router.proj.scale")
    path, _, leaf = name.replace("router.per_expert_scale", "experts.down_proj.scale").rpartition(".")
    if leaf.endswith("_bias"):  # of experts
        path, leaf = f"{path}.{leaf.removesuffix('_bias')}", "bias"
    elif leaf not in ("weight", "bias", "scale"):
        path, leaf = f"{path}.{leaf}", "weight"
    whole = table.get_name(path)
    if found := [full for full in (f"{whole}.{leaf}", whole) if full in stored]:
        return (found[0],)
    base, has_halves = path.removesuffix("gate_up_proj"), path.endswith("experts.gate_up_proj")
    halves = [f"{table.get_name(f'{base}{half}_proj')}.{leaf}" for half in ("gate", "up")] if has_halves else []
    return tuple(halves)


def _change(name: str, number: int, made: Architecture, config: Any, shape: torch.Size) -> Change | None:
    """What makes of `number` tensors that llama.cpp stores the named one of transformers, which has that shape."""
    *_, module, leaf = name.split(".")
    if number == 2:  # gate and up of experts
        rows = -1 if leaf.endswith("_bias") else -2
        if made.transposes_experts:  # and joins them in turns
            return lambda gate, up: torch.stack((gate, up), rows).flatten(rows - 1, rows)
        return lambda gate, up: torch.cat((gate, up), rows)
    if made.permutes and module in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        # The halves of a head are one after the other in transformers, in turns in the file.
        return lambda rows: rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
    if ".linear_attn." in name:
        return _of_linear_attention(f"{module}.{leaf}", config, shape)
    if module in ("conv", "shared_expert_gate"):  # llama.cpp leaves out dimensions of one element
        return lambda weight: weight.reshape(shape) if weight.dim() < len(shape) else weight
    return None


def _other_values(name: str, made: Architecture) -> OtherValues | None:
    if name.endswith("A_log"):
        return _DECAY
    is_shifted = made.shifts_norms and name.endswith("norm.weight") and ".linear_attn." not in name
    return _ONE_MORE if is_shifted else None


def _of_linear_attention(name: str, config: Any, shape: torch.Size) -> Change | None:
    """For Qwen 3.5's linear attention. llama.cpp stores its heads of values in another order: the first one of each
    key, then the second of each."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    is_one = name.endswith(("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight"))
    size = values * (1 if is_one else config.linear_value_head_dim)

    def group(rows: Tensor) -> Tensor:
        others, stored = rows[:-size], rows[-size:]
        heads = stored.reshape(values // keys, keys, -1, *rows.shape[1:]).transpose(0, 1)
        grouped = torch.cat((others, heads.reshape(stored.shape)))
        return grouped.reshape(shape) if name == "conv1d.weight" else grouped

    if name == "out_proj.weight":
        return None if values == keys else lambda weight: group(weight.mT).mT
    return None if name == "norm.weight" else group

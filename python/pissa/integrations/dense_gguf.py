"""A new GGUF file of a model whose base is none: the merged model, each tensor put where our reader of GGUF files looks
for it. The file is refused unless it reads back as the same model and the same tokenizer."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import gguf
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from pissa.base.digest import bytes_of
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.gguf_file import GgufFile
from pissa.containers.gguf_metadata import (
    WRITTEN,
    architecture_for,
    differences,
    metadata_of,
    rope_tensors,
    text_class,
)
from pissa.containers.gguf_model import GgufSource, stored_shapes
from pissa.containers.gguf_tokenizer import SAMPLE, tokenizer_metadata

_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}

_NO_CODES = torch.empty(0).numpy().dtype
"""What gguf asks for beside the type: with uint8, it would take the shape for that of bytes."""

_IN_FLOAT32 = (
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "ssm_conv1d.weight",
    "shortconv.conv.weight",
    ".bias",
)
"""The matrices that llama.cpp has in float32 only: those that choose experts, convolutions, biases of experts."""

TYPES = ("q8_0",)
"""The types of codes in which matrices are written, by gguf-py's own rounding, to the nearest."""

_NOT_IN_CODES = "ssm_out.weight"
"""Whose columns, which codes join, stand in another order in the file."""


class Text(NamedTuple):
    """What a file has of a model: all, or the part for text, since llama.cpp reads images by another file (mmproj)."""

    model: PreTrainedModel
    architecture: str
    """llama.cpp's name."""
    inner: str
    """What precedes the names of layers in the whole model."""

    @property
    def is_part(self) -> bool:
        return self.inner != _ALL

    def name_in_whole(self, name: str) -> str:
        """The name of a parameter in the whole model."""
        return self.inner + name.removeprefix(_ALL) if name.startswith(_ALL) else name


_ALL = "model."


def text_of(model: Checkpoint) -> Text:
    """What a file has of the model.

    Raises:
        ValueError: it is of a kind that is not written. The message says which.
    """
    whole, inner = model.model, _ALL
    text, config = whole, whole.config.get_text_config()
    if config is not whole.config and (name := text_class(config.model_type)):
        config = copy.deepcopy(config)
        config.tie_word_embeddings = whole.config.tie_word_embeddings
        with torch.device("meta"):
            text = getattr(transformers, name)(config)
        inner = "model.language_model."
    architecture = architecture_for(type(text).__name__)
    found = Text(text, architecture or "", inner)
    lacking = [name for name in text.state_dict() if found.name_in_whole(name) not in model.tensors]
    if architecture is None or lacking:
        raise ValueError(f"it is a {type(whole).__name__}; written are {', '.join(WRITTEN)}")
    return found


def describe(model: Checkpoint, tokenizer: Any) -> tuple[Text, dict[str, Any]]:
    """What a file has of the model, and its metadata.

    Raises:
        ValueError: the model or its tokenizer is of a kind that is not written. The message says which.
    """
    text = text_of(model)
    config = text.model.config
    end = getattr(model.built_config(), "eos_token_id", None) or config.eos_token_id
    metadata = metadata_of(config, text.architecture, stored_shapes(text.model, text.architecture))
    ends = end if isinstance(end, list) else [end]
    return text, metadata | tokenizer_metadata(tokenizer, config.vocab_size, ends)


def write(path: Path, model: Checkpoint, tokenizer: Any, texts: dict[str, str], blocks: str | None) -> None:
    """Writes the model in a dense checkpoint to the file `path`, in the dtype of its embedding; norms and biases are
    float32. With `blocks`, one of `TYPES`, matrices whose rows are full blocks are in these codes. One matrix is in
    memory at a time. Raises the errors of `describe`."""
    text, metadata = describe(model, tokenizer)
    config = text.model.config
    shapes, rope = stored_shapes(text.model, text.architecture), rope_tensors(config)
    dtype = model.entry(model.parts_of(text.name_in_whole("model.embed_tokens.weight"))[0].tensor).dtype
    if dtype not in _TYPES:
        raise ValueError(f"its weights are {dtype}; written are {', '.join(map(str, _TYPES))}")
    kind, file_type = _TYPES[dtype]
    codes = None if blocks is None else gguf.GGMLQuantizationType[blocks.upper()]
    writer = gguf.GGUFWriter(path, text.architecture)
    writer.add_file_type(file_type if blocks is None else gguf.LlamaFileType[f"MOSTLY_{blocks.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {"general.type": "model", **texts, **metadata}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {str: "string", bool: "bool", int: "uint32", float: "float32"}[type(value)]
            getattr(writer, f"add_{add}")(key, value)
    for name, shape in (shapes | {name: tuple(values.shape) for name, values in rope.items()}).items():
        stored = kind
        if len(shape) == 1 or name.endswith(_IN_FLOAT32):
            stored = gguf.GGMLQuantizationType.F32
        elif codes and shape[-1] % gguf.GGML_QUANT_SIZES[codes][0] == 0 and not name.endswith(_NOT_IN_CODES):
            stored = codes
        block, size = gguf.GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(name, shape, _NO_CODES, torch.Size(shape).numel() // block * size, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("rb+") as file:  # config.json is not read without the tensors of rope
        file.truncate(_aligned(file.seek(0, 2)) + sum(_aligned(info.nbytes) for info in writer.tensors[0].values()))
        for name, values in rope.items():
            file.seek(GgufFile(path).entries[name].offset)
            file.write(bytes_of(values))
    made = Checkpoint.open(path)
    _check(made, config, tokenizer)
    with path.open("rb+") as file:

        def put(position: int, values: Tensor) -> None:
            file.seek(position)
            file.write(bytes_of(values.contiguous()))

        for name in made.stored.names:
            _write_parameter(name, text.name_in_whole(name), model, made, codes, put)


def _check(made: Checkpoint, config: Any, tokenizer: Any) -> None:
    """Refuses a file whose metadata do not say everything: llama.cpp would compute another model, without a word."""
    if lost := differences(config, made.built_config()):
        raise ValueError(f"its metadata cannot say all of config.json: {', '.join(lost)}")
    text = unicodedata.normalize("NFC", SAMPLE)  # some tokenizers do this first, and llama.cpp none
    ours, read = (each(text, add_special_tokens=False).input_ids for each in (tokenizer, made.tokenizer()))
    if ours != read:
        raise ValueError("its tokenizer divides texts in another way than that which is read back from the file")


def _aligned(position: int) -> int:
    return -(-position // 32) * 32


def _write_parameter(
    name: str, whole: str, model: Checkpoint, made: Checkpoint, codes: Any, put: Callable[[int, Tensor], None]
) -> None:
    """Puts a parameter, named `whole` in the model, into the file, whose tensors may be several: a matrix at a time."""
    source, dtype = cast(GgufSource, made.stored), made.stored.entry(name).dtype
    is_stack = made.tensors[name].dim() == 3 and not name.endswith(".weight")  # as the weight of a convolution
    if name not in made.coded and not is_stack:
        parts = model.parts_of(whole)
        for _, position, values in source.stored_values(name, model.matrix(parts)):
            put(position, values)
        model.release([part.tensor for part in parts])
        return
    for member, parts in enumerate(model.layers_of(whole).values()):
        matrix = model.matrix(parts)
        if name in made.coded:
            rows = torch.from_numpy(gguf.quants.quantize(matrix.float().contiguous().numpy(), codes))
        else:
            rows = matrix.to(dtype)
        for _, position, values in source.stored_rows(name, rows, member):
            put(position, values)
        model.release([part.tensor for part in parts])

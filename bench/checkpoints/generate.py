"""Generates a checkpoint of Llama's architecture with weights whose spectra are like a trained model's.

The weights of the layers have the singular values c * i^-0.45. One weight of each shape is made, from a diagonal by
orthogonal transforms. Each layer permutes its rows and flips the signs of some columns, which preserves the spectrum.
Embeddings are noise, and norms are 1. The same name, shape and seed give the same bytes. Files are written tensor by
tensor. If something fails, the folder is removed.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

EXPONENT = 0.45
SHARD_BYTES = 5_000_000_000
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_CHUNK_ROWS = 4096  # of an embedding


def _llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int = 32000, **more: Any) -> dict[str, Any]:
    """The fields of a LlamaConfig. Embeddings are tied unless `more` says otherwise."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "vocab_size": vocabulary, "tie_word_embeddings": True}
    return {**sizes, **more}


_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3 = {
    **{"vocabulary": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "rope_parameters": _ROPE | {"original_max_position_embeddings": 8192},
}
_UNTIED = {"tie_word_embeddings": False}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _llama(64, 128, 2, 4, 512, num_key_value_heads=2, max_position_embeddings=2048, **_UNTIED),
    "100m": _llama(768, 2048, 12, 12),
    "350m": _llama(1024, 2816, 24, 16),
    "1b": _llama(2048, 8192, 16, 32, head_dim=64, **_LLAMA_3),  # Llama-3.2-1B's and 3B's
    "3b": _llama(3072, 8192, 28, 24, head_dim=128, **_LLAMA_3),
    "7b": _llama(  # Llama-2-7B's
        4096, 11008, 32, 32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5, **_UNTIED
    ),
}


# ---- Weights ---------------------------------------------------------------------------------------------------------


def singular_values(count: int) -> Tensor:
    """i^-0.45 for i = 1 to `count`: float32."""
    return torch.arange(1, count + 1, dtype=torch.float32) ** -EXPONENT


@functools.cache
def base_weight(rows: int, cols: int, dtype: torch.dtype, seed: int) -> Tensor:
    """The weight [rows, cols] of which all layers of this shape are made; the mean square of elements is 1 / cols."""
    generator = torch.Generator().manual_seed(seed)
    values = singular_values(min(rows, cols))
    weight = torch.zeros(rows, cols)
    weight.diagonal().copy_(values * (rows / values.square().sum()).sqrt())
    for axis in (0, 1):
        for _ in range(2):  # after one round elements still show that there was a diagonal
            weight = _rotated(weight, axis, generator)
    return weight.to(dtype)


def _rotated(weight: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """The Hartley transform, which is orthogonal, of lines in random order with random signs."""
    size = weight.shape[axis]
    shape = (-1, 1) if axis == 0 else (1, -1)
    mixed = weight.index_select(axis, torch.randperm(size, generator=generator)) * _signs(size, generator).view(shape)
    spectrum = torch.fft.fft(mixed, dim=axis, norm="ortho")
    return spectrum.real - spectrum.imag


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return 1.0 - 2.0 * torch.randint(2, (size,), generator=generator)


def values_of(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Iterator[Tensor]:
    """The tensor of that name, in parts of a few rows each."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    if len(shape) == 1:
        yield torch.ones(shape, dtype=dtype)
    elif name.endswith("_proj.weight"):
        base = base_weight(*shape, dtype, seed)
        order = torch.randperm(shape[0], generator=generator)
        yield base[order] * _signs(shape[1], generator).to(dtype)
    else:
        for first in range(0, shape[0], _CHUNK_ROWS):
            rows = min(_CHUNK_ROWS, shape[0] - first)
            yield (torch.randn(rows, *shape[1:], generator=generator) / 50).to(dtype)  # 0.02, as in Llama


# ---- Files -----------------------------------------------------------------------------------------------------------


def generate(out: Path, shape: str, dtype: str = "bf16", seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes the checkpoint into a new folder. Returns the bytes of its tensors.

    Raises:
        FileExistsError: the folder is there.
        OSError: the disk is too small, or anything else; the folder is removed.
    """
    from transformers import GenerationConfig, LlamaConfig

    kind = DTYPES[dtype]
    config = LlamaConfig(**SHAPES[shape], architectures=["LlamaForCausalLM"], dtype=str(kind).removeprefix("torch."))
    sizes = tensor_shapes(config)
    out.mkdir(parents=True)
    try:
        total = sum(math.prod(size) for size in sizes.values()) * kind.itemsize
        free = shutil.disk_usage(out).free
        if total > free - (1 << 30):
            raise OSError(f"{out}: {shape} needs {total / 1e9:.1f} GB and 1 GB to spare, free are {free / 1e9:.1f} GB")
        config.save_pretrained(out)
        GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id).save_pretrained(out)
        _save_tokenizer(out)
        _write_shards(out, sizes, kind, seed, shard_bytes)
    except BaseException:
        shutil.rmtree(out)
        raise
    finally:
        base_weight.cache_clear()
    return total


@contextmanager
def generated(out: Path, shape: str, **options: Any) -> Iterator[Path]:
    """The folder with the checkpoint. It is removed at the end."""
    generate(out, shape, **options)
    try:
        yield out
    finally:
        shutil.rmtree(out)


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The names in the files of that model, and the shapes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else ()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _write_shards(
    out: Path, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int, shard_bytes: int
) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in sizes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += nbytes
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        with (out / file).open("wb") as stream:
            _write_shard(stream, shard, dtype, seed)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in sizes.values()) * dtype.itemsize
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(stream: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        for part in values_of(name, shape, dtype, seed):
            stream.write(part.contiguous().view(torch.uint8).numpy().data)


def _save_tokenizer(out: Path) -> None:
    """A token for each byte, after <unk>, <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    unknown, first, last = special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=first, eos_token=last, pad_token=last
    )
    fast.save_pretrained(out)

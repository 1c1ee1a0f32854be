"""A LoRA for llama.cpp, as its own converter writes it: a file of GGUF, with the names and the order of rows that the
converted base has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor

from pissa.conversion.plain_lora import PlainLora
from pissa.files.hub import Name
from pissa.files.lora_folder import LoraFactors, LoraFolder
from pissa.files.messages import shown
from pissa.files.model_folder import class_of, model_config
from pissa.files.staged import staged
from pissa.integrations.exported import Exported
from pissa.integrations.plain import padded, read_factors


class _Family(NamedTuple):
    """What llama.cpp makes of a model."""

    arch: gguf.MODEL_ARCH
    permutes: bool = False
    """Whether the rows of q and k are in the order that llama.cpp's rotary embedding takes."""


_FAMILIES = {
    "LlamaForCausalLM": _Family(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "MistralForCausalLM": _Family(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "Qwen2ForCausalLM": _Family(gguf.MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": _Family(gguf.MODEL_ARCH.QWEN3),
    "GemmaForCausalLM": _Family(gguf.MODEL_ARCH.GEMMA),
    "Gemma2ForCausalLM": _Family(gguf.MODEL_ARCH.GEMMA2),
    "Gemma3ForCausalLM": _Family(gguf.MODEL_ARCH.GEMMA3),
}
"""By the class of transformers."""

_INPUT, _OUTPUT = "token_embd", "output"
"""What llama.cpp calls the embedding and the output layer."""


def export_gguf(adapter: Path, base: Name, target: Path, initial: Name | None) -> Exported:
    """Writes the adapter to the new file `target`, float32, a layer at a time.

    Args:
        base: the folder of the model, or its name on the Hub. Its config.json is read; its weights only if the adapter
            cannot be read without them.

    Raises:
        ValueError: what llama.cpp does not take from an adapter, by name, or a model that is not known here. Nothing is
            written then.
    """
    if target.exists():
        raise ValueError(f"{target} is there already and nothing is overwritten; choose a new file")
    lora = read_factors(adapter, base, initial, "llama.cpp")
    config = model_config(base)
    arch, places = _places(class_of(config).__name__, config, lora.folder)
    rank = max(lora.rank(name) for name in lora.folder.factors)
    alpha = rank * lora.scaling
    with staged(target.parent) as new:
        writer = gguf.GGUFWriter(new(target.name), arch)
        try:
            _write(writer, lora, places, alpha)
        finally:
            writer.close()
    return Exported(
        what=lora.what,
        layers=lora.layers,
        written=f"a LoRA of rank {rank} in GGUF, architecture {arch}",
        bytes_written=target.stat().st_size,
        load=f"llama-cli -m BASE.gguf --lora {target}",
    )


def _write(writer: gguf.GGUFWriter, lora: PlainLora, places: dict[str, _Place], alpha: float) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    kind = torch.empty(0).numpy().dtype
    for target, factors in lora.folder.factors.items():
        for ending, shape in zip("ab", _shapes(factors, lora.rank(target)), strict=True):
            writer.add_tensor_info(f"{places[target].name}.weight.lora_{ending}", shape, kind, 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, factors in lora.folder.factors.items():
        (pair,), rank = lora.matrices(target), lora.rank(target)
        pair = padded(pair, rank, factors.scaling * rank / alpha)  # llama.cpp scales by alpha / rank
        for tensor in _arranged(factors, places[target].heads, *pair):
            writer.write_tensor_data(tensor.float().contiguous().numpy())


def _shapes(factors: LoraFactors, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Those of the two tensors of a layer: an embedding's first is transposed."""
    (columns,) = factors.row
    return (columns, rank) if factors.is_embedding else (rank, columns), (factors.out, rank)


def _arranged(factors: LoraFactors, heads: int | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors, from the factors a [rank, in] and b [out, rank]."""
    if heads is not None:
        b = b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
    return a.mT if factors.is_embedding else a, b


class _Place(NamedTuple):
    """What llama.cpp makes of a layer."""

    name: str
    heads: int | None
    """The heads in whose rows the halves that are rotated together alternate there; None if none do."""


def _places(kind: str, config: Any, adapter: LoraFolder) -> tuple[str, dict[str, _Place]]:
    """The architecture of a model of that class, and the place of each target.

    Raises:
        ValueError: llama.cpp has no adapter of such a layer, or the class is not known here.
    """
    if kind not in _FAMILIES:
        raise ValueError(
            f"the base is a {kind}; known here, of what llama.cpp has, are {', '.join(_FAMILIES)}: export to merged, "
            "and convert that with llama.cpp's own converter"
        )
    family, queries = _FAMILIES[kind], config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    permuted = {"attn_q": queries, "attn_k": keys} if family.permutes else {}
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    places = {}
    for target, factors in adapter.factors.items():
        name = names.get_name(factors.layers[0]) or ""
        places[target] = _Place(name, heads := permuted.get(name.rpartition(".")[2]))
        if len(factors.layers) > 1 or not name:
            reason = "which llama.cpp has under no name known here"
        elif name in (_INPUT, _OUTPUT) and config.tie_word_embeddings:
            reason = "whose weight is tied to another's, and llama.cpp has but one"
        elif len(factors.row) != 1 or factors.is_embedding != (name == _INPUT):
            reason = f"{list(factors.row)} in a row of a: llama.cpp has no such layer of that name"
        elif heads is not None and factors.out % (2 * heads):
            reason = f"of {factors.out} rows, which are no {heads} heads, as config.json says"
        else:
            continue
        raise ValueError(
            f"{adapter.weights.path} has factors of layer {shown(target)}, {reason}: export to merged, and convert that"
        )
    return gguf.MODEL_ARCH_NAMES[family.arch], places

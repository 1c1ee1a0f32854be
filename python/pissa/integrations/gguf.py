"""A LoRA for llama.cpp, for one GGUF file: the names, the order of rows and the stacks of experts are those of that
file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import gguf
import torch
from torch import Tensor

from pissa.adapters.lora_folder import LoraFactors, LoraFolder
from pissa.containers.checkpoint import Checkpoint, Contents
from pissa.containers.gguf_model import GgufSource, Place
from pissa.containers.hub import Name
from pissa.containers.messages import quote
from pissa.containers.staged import check_new, staged
from pissa.conversion.plain_lora import PlainLora
from pissa.integrations.exported import MERGE, Exported, no_base, read_factors
from pissa.system import shell

_WITHOUT_LORA = {"per_layer_model_proj.weight", "per_layer_token_embd.weight"}
"""Weights of Gemma 4 with which llama.cpp computes without an adapter. It says nothing about that."""


def export_lora(adapter: LoraFolder, base: Name | None, target: Path) -> Exported:
    """Writes the adapter to the new file `target`, float32, one target at a time. `base` is the GGUF file with which
    llama.cpp runs it. Raises ValueError for another base, and for anything that llama.cpp does not take from an
    adapter, which is named."""
    model = base or adapter.named_base
    if model is None:
        raise no_base(adapter)
    check_new(target)
    checkpoint = Checkpoint.open(model)
    if checkpoint.contents is not Contents.GGUF:
        raise ValueError(
            f"{checkpoint.name} contains {checkpoint.contents.value}; needed: the GGUF file with which llama.cpp runs "
            f"the adapter, whose names and order of rows it has (base); or run {MERGE}, and convert that [P123]"
        )
    lora, source = read_factors(adapter, base, "llama.cpp"), cast(GgufSource, checkpoint.stored)
    places = {name: _place(lora.folder, source, name) for name in lora.folder.factors}
    rank = max(lora.rank(name) for name in places)
    alpha = rank * lora.scaling
    architecture = checkpoint.files[0].metadata["general.architecture"]
    with (
        staged(target.parent) as new,
        closing(gguf.GGUFWriter(new(target.name), architecture, use_temp_file=True)) as writer,
    ):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, place in places.items():
            for stored, a, b in _arranged(lora, name, place):
                b = lora.folder.factors[name].scaling * b.shape[-1] / alpha * b  # llama.cpp scales by alpha / rank
                if (scale := name.removesuffix("experts.down_proj") + "router.per_expert_scale") in source.names:
                    b = source.read(scale)[:, None, None] * b  # of the whole expert, and llama.cpp scales its weight
                a = a.mT if lora.folder.factors[name].is_embedding else a
                for ending, tensor in zip("ab", (a, b), strict=True):
                    writer.add_tensor(f"{stored}.lora_{ending}", tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return Exported(
        what=lora.what,
        layers=lora.layers,
        written=f"a LoRA of rank {rank} in GGUF, architecture {architecture}",
        bytes_written=target.stat().st_size,
        load=shell("llama-cli", "-m", str(checkpoint.folder), "--lora", str(target)),
    )


def _place(adapter: LoraFolder, source: GgufSource, target: str) -> Place:
    """Where the file stores the weights that a target changes. Raises the errors of `export_lora`."""
    factors: LoraFactors = adapter.factors[target]
    is_stack = len(factors.layers) > 1
    name = target if factors.is_fused else f"{factors.layers[0]}.weight"
    if name not in source.names or is_stack != factors.is_fused:
        reason = "which the file has under no name, or under that of a layer to which its weight is tied"
    elif (place := source.place(name)).tensors.keys() & _WITHOUT_LORA:
        reason = "to whose weight llama.cpp adds no adapter (exclude_modules leaves it out)"
    elif factors.is_embedding and "output.weight" not in source.stored_names:
        reason = "whose weight is also the output layer's in this file"
    else:
        shape, stored = (factors.out, *factors.row), (sum(place.tensors.values()), source.columns(name))
        if shape in (stored, stored[::-1] if factors.mirrored or factors.is_embedding else stored):
            return place
        reason = f"for a weight {list(shape)}, which is {list(stored)} in the file"
    raise ValueError(
        f"{adapter.weights.path} has factors of layer {quote(target)}, {reason}: run {MERGE}, and convert that [P122]"
    )


def _arranged(lora: PlainLora, target: str, place: Place) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The factors a [..., rank, in] and b [..., out, rank] of each stored tensor; those of experts are stacks."""
    pairs = lora.matrices(target)
    a, b = (torch.stack(factors) for factors in zip(*pairs, strict=True)) if len(pairs) > 1 else pairs[0]
    if place.columns is not None:
        a = torch.empty_like(a).index_copy_(-1, place.columns, a)
    if place.rows is not None:
        b = torch.empty_like(b).index_copy_(-2, place.rows, b)
    parts = torch.split(b, list(place.tensors.values()), -2) if len(place.tensors) > 1 else (b,)
    for stored, part in zip(place.tensors, parts, strict=True):
        yield stored, a, part

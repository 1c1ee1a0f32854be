"""A LoRA for llama.cpp, as its own converter writes it: a GGUF file with the names and the row order of the converted
base."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from pissa.adapters.lora_folder import LoraFactors, LoraFolder
from pissa.containers.hub import Name
from pissa.containers.messages import quote
from pissa.containers.model_folder import class_of, model_config
from pissa.containers.staged import staged
from pissa.integrations.exported import MERGE, Exported, no_base, read_factors

_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GemmaForCausalLM": gguf.MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
}
"""llama.cpp's architectures for the classes of transformers. For LLAMA, the rows of q and k are in the order that its
rotary embedding uses."""


def export_lora(adapter: LoraFolder, base: Name | None, target: Path, initial: Name | None) -> Exported:
    """Writes the adapter to the new file `target`, float32, a layer at a time. Raises ValueError for a model that is
    not known here, and for anything that llama.cpp does not take from an adapter, which is named."""
    model = base or adapter.named_base
    if model is None:
        raise no_base(adapter)
    if target.exists():
        raise ValueError(f"{target} exists already and nothing is overwritten; choose a new file")
    lora = read_factors(adapter, base, initial, "llama.cpp")
    config = model_config(model)
    arch, places = _places(class_of(config).__name__, config, lora.folder)
    rank = max(lora.rank(name) for name in lora.folder.factors)
    alpha = rank * lora.scaling
    with (
        staged(target.parent) as new,
        closing(gguf.GGUFWriter(new(target.name), arch, use_temp_file=True)) as writer,
    ):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, factors in lora.folder.factors.items():
            ((a, b),) = lora.matrices(name)
            place, heads = places[name]
            b = factors.scaling * len(a) / alpha * b  # llama.cpp scales by alpha / rank
            for ending, tensor in zip("ab", _arrange(factors, heads, a, b), strict=True):
                writer.add_tensor(f"{place}.weight.lora_{ending}", tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return Exported(
        what=lora.what,
        layers=lora.layers,
        written=f"a LoRA of rank {rank} in GGUF, architecture {arch}",
        bytes_written=target.stat().st_size,
        load=f"llama-cli -m BASE.gguf --lora {target}",
    )


def _arrange(factors: LoraFactors, heads: int | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors, from the factors a [rank, in] and b [out, rank]. An embedding's first is transposed."""
    if heads is not None:
        b = b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
    return a.mT if factors.is_embedding else a, b


def _places(model_class: str, config: Any, adapter: LoraFolder) -> tuple[str, dict[str, tuple[str, int | None]]]:
    """The architecture for a model of that class, and for each target its name there and the number of heads in whose
    rows the halves that are rotated together alternate; None if none do. Raises the errors of `export_lora`."""
    if model_class not in _ARCHITECTURES:
        raise ValueError(
            f"the base is a {model_class}; the architectures of llama.cpp known here are {', '.join(_ARCHITECTURES)}: "
            f"run {MERGE}, and convert that with llama.cpp's own converter"
        )
    arch, queries = _ARCHITECTURES[model_class], config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    permuted = {"attn_q": queries, "attn_k": keys} if arch == gguf.MODEL_ARCH.LLAMA else {}
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    places = {}
    for target, factors in adapter.factors.items():
        name = names.get_name(factors.layers[0]) or ""
        places[target] = name, (heads := permuted.get(name.rpartition(".")[2]))
        if len(factors.layers) > 1 or not name:
            reason = "which llama.cpp has under no name known here"
        elif name in ("token_embd", "output") and config.tie_word_embeddings:
            reason = "whose weight is tied to another's, and llama.cpp has but one"
        elif len(factors.row) != 1 or factors.is_embedding != (name == "token_embd"):
            reason = f"{list(factors.row)} in a row of a: llama.cpp has no such layer of that name"
        elif heads is not None and factors.out % (2 * heads):
            reason = f"of {factors.out} rows, which are not {heads} heads, as config.json says"
        else:
            continue
        raise ValueError(
            f"{adapter.weights.path} has factors of layer {quote(target)}, {reason}: run {MERGE}, and convert that"
        )
    return gguf.MODEL_ARCH_NAMES[arch], places

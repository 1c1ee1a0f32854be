"""A LoRA for llama.cpp, as its own converter writes it: a file of GGUF, with the names and the order of rows that the
converted base has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor

from pissa.files.lora_folder import LoraFactors
from pissa.files.messages import shown
from pissa.files.model_folder import class_of, model_config
from pissa.files.staged import Staged
from pissa.integrations.exported import Exported
from pissa.integrations.plain import Name, PlainLora, padded


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
    lora = PlainLora.read(adapter, base, initial, "llama.cpp")
    names = _Names.of(base, lora)
    rank = max(lora.rank(name) for name in lora.folder.factors)
    alpha = rank * lora.scaling
    with Staged(target.parent) as staged:
        writer = gguf.GGUFWriter(staged.path(target.name), gguf.MODEL_ARCH_NAMES[names.family.arch])
        try:
            _write(writer, lora, names, alpha)
        finally:
            writer.close()
    return Exported(
        what=lora.what,
        layers=lora.layers,
        written=f"a LoRA of rank {rank} in GGUF, architecture {gguf.MODEL_ARCH_NAMES[names.family.arch]}",
        bytes_written=target.stat().st_size,
        load=f"llama-cli -m BASE.gguf --lora {target}",
    )


def _write(writer: gguf.GGUFWriter, lora: PlainLora, names: _Names, alpha: float) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    kind = torch.empty(0).numpy().dtype
    for target, factors in lora.folder.factors.items():
        for name, (rows, columns) in names.shapes(factors, lora.rank(target)).items():
            writer.add_tensor_info(name, (rows, columns), kind, 4 * rows * columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, factors in lora.folder.factors.items():
        (pair,), rank = lora.matrices(target), lora.rank(target)
        pair = padded(pair, rank, factors.scaling * rank / alpha)  # llama.cpp scales by alpha / rank
        for tensor in names.arranged(factors, *pair):
            writer.write_tensor_data(tensor.float().contiguous().numpy())


class _Names:
    """What llama.cpp calls the layers of a model.

    Args:
        config: of the model.
    """

    def __init__(self, family: _Family, config: Any) -> None:
        self.family, self._config = family, config
        self._map = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)

    @staticmethod
    def of(base: Name, lora: PlainLora) -> _Names:
        """Those of the base; refuses layers that llama.cpp has no adapter of."""
        config = model_config(base)
        kind = class_of(config).__name__
        if kind not in _FAMILIES:
            raise ValueError(
                f"{base} is a {kind}; known here, of what llama.cpp has, are {', '.join(_FAMILIES)}: export to merged, "
                "and convert that with llama.cpp's own converter"
            )
        names = _Names(_FAMILIES[kind], config)
        for factors in lora.folder.factors.values():
            names.check(factors, lora.folder.weights.path)
        return names

    def shapes(self, factors: LoraFactors, rank: int) -> dict[str, tuple[int, int]]:
        """The tensors of a layer, with their shapes."""
        (columns,), rows = factors.row, factors.out
        first = (columns, rank) if factors.is_embedding else (rank, columns)
        name = f"{self._name(factors)}.weight"
        return {f"{name}.lora_a": first, f"{name}.lora_b": (rows, rank)}

    def arranged(self, factors: LoraFactors, a: Tensor, b: Tensor) -> Iterator[Tensor]:
        """The same tensors, from the factors a [rank, in] and b [out, rank]: a is an embedding's transposed, and the
        rows of q and k are in llama.cpp's order."""
        yield a.mT if factors.is_embedding else a
        heads = self._heads(factors)
        yield b if heads is None else b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)

    def _heads(self, factors: LoraFactors) -> int | None:
        """The heads in whose rows the halves that are rotated together alternate in llama.cpp; None if none do."""
        if not self.family.permutes:
            return None
        heads = {
            "attn_q": self._config.num_attention_heads,
            "attn_k": getattr(self._config, "num_key_value_heads", None) or self._config.num_attention_heads,
        }
        return heads.get(str(self._name(factors)).rpartition(".")[2])

    def _name(self, factors: LoraFactors) -> str | None:
        name: str | None = self._map.get_name(factors.layers[0])
        return name

    def check(self, factors: LoraFactors, path: Path) -> None:
        """Raises ValueError, naming the layer, if llama.cpp has no such factors of it. `path`: of their file."""
        name = self._name(factors)
        if len(factors.layers) > 1 or name is None:
            reason = "which llama.cpp has under no name known here"
        elif name in (_INPUT, _OUTPUT) and self._config.tie_word_embeddings:
            reason = "whose weight is tied to another's, and llama.cpp has but one"
        elif len(factors.row) != 1 or factors.is_embedding != (name == _INPUT):
            reason = f"{list(factors.row)} in a row of a: llama.cpp has no such layer of that name"
        elif (heads := self._heads(factors)) is not None and factors.out % (2 * heads):
            reason = f"of {factors.out} rows, which are no {heads} heads, as config.json says"
        else:
            return
        raise ValueError(
            f"{path} has factors of layer {shown(factors.target)}, {reason}: export to merged, and convert that"
        )

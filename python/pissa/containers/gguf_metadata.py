"""The metadata that a new GGUF file gets: the inverse of gguf_config.py. What the metadata cannot say of a model is
found by reading them back."""

from __future__ import annotations

import math
from typing import Any

import torch

from pissa.containers.gguf_config import ARCHITECTURES, FIELDS
from pissa.containers.messages import quote

_AS_LLAMA = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}
"""Models that llama.cpp knows as "llama"."""

_WRITTEN = ("gemma", "gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe")

_OF_CLASSES = {ARCHITECTURES[name].model_class: name for name in _WRITTEN} | dict.fromkeys(_AS_LLAMA.values(), "llama")
WRITTEN = tuple(_OF_CLASSES)
"""transformers' classes of the models that are written."""


def architecture_for(model_class: str) -> str | None:
    """llama.cpp's name of a model's architecture. None if it is not written."""
    return _OF_CLASSES.get(model_class)


def metadata_of(config: Any, architecture: str) -> dict[str, Any]:
    """The keys and values that describe the model of that `config`.

    Raises:
        ValueError: it has a rotary embedding that is not written.
    """
    fields = {key: getattr(config, theirs, None) for key, theirs in FIELDS.items()}
    rope = config.rope_parameters
    width = config.hidden_size // config.num_attention_heads
    head = getattr(config, "head_dim", None) or width
    if "full_attention" in rope:
        fields["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if config.model_type == "mixtral":
        fields["expert_count"] = config.num_local_experts
    if architecture in ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe"):
        fields["attention.sliding_window"] = None  # llama.cpp has none for these
    fields["attention.key_length"] = fields["attention.value_length"] = head
    fields["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1.0) * head)
    fields["rope.freq_base"] = float(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        fields["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
        betas = {beta: rope.get(beta) for beta in ("beta_fast", "beta_slow")}
        fields |= {f"rope.scaling.yarn_{beta}": float(value) for beta, value in betas.items() if value is not None}
    elif kind not in ("default", "llama3", "longrope"):
        raise ValueError(f"its rope_type is {quote(kind)}; written are default, linear, llama3, longrope, yarn")
    if architecture == "phi3":
        original = config.original_max_position_embeddings
        fields["rope.scaling.original_context_length"] = original
        if kind == "longrope":
            scale = config.max_position_embeddings / original
            fields["rope.scaling.attn_factor"] = (
                math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            )
    return {f"{architecture}.{key}": value for key, value in fields.items() if value is not None}


def rope_tensors(config: Any) -> dict[str, torch.Tensor]:
    """The tensors, float32, in which a file has what its metadata do not say of the rotary embedding."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"]) for which in ("short", "long")}
    if rope.get("rope_type") != "llama3":
        return {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = length / (2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).float()}


_NOT_COMPARED = {
    "_name_or_path", "architectures", "dtype", "model_type", "transformers_version", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "router_aux_loss_coef", "output_router_logits", "pretraining_tp",
    "cache_implementation", "max_window_layers",
}  # fmt: skip
"""Fields that change no answer, and `max_window_layers`, which `layer_types` says too."""


def differences(config: Any, read: Any) -> list[str]:
    """The fields of `config` that the configuration which was `read` back has with another value, in words."""
    known = type(config)().to_dict()
    wanted, found = config.to_dict(), read.to_dict()
    names = [name for name in wanted if name in known and name not in _NOT_COMPARED and "drop" not in name]
    pairs = {name: (_plain(wanted[name]), _plain(found.get(name))) for name in names}
    return [f"{name}={quote(a)} becomes {quote(b)}" for name, (a, b) in pairs.items() if a != b and (a or b)]


def _plain(value: Any) -> Any:
    """Without what is None, and with numbers as the file's float32 has them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value

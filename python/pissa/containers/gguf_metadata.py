"""The metadata that a new GGUF file gets: the inverse of gguf_config.py. What the metadata cannot say of a model is
found by reading them back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pissa.containers.gguf_config import ARCHITECTURES, FIELDS
from pissa.containers.messages import quote

_AS_LLAMA = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}
"""Models that llama.cpp knows as "llama"."""

_OF_CLASSES = {made.model_class: name for name, made in ARCHITECTURES.items()}
_OF_CLASSES |= dict.fromkeys(_AS_LLAMA.values(), "llama")
WRITTEN = tuple(_OF_CLASSES)
"""transformers' classes of the models that are written."""


def architecture_for(model_class: str) -> str | None:
    """llama.cpp's name of a model's architecture. None if it is not written."""
    return _OF_CLASSES.get(model_class)


def text_class(model_type: str) -> str | None:
    """The class of the text model in a model of several kinds of input, by its `model_type`. None if it is not
    written."""
    return next((made.model_class for made in ARCHITECTURES.values() if made.model_type == model_type), None)


def metadata_of(config: Any, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The keys and values that describe the model of that `config`, whose tensors have these `shapes`.

    Raises:
        ValueError: it has a rotary embedding, or sizes, that are not written.
    """
    by_layer = {} if architecture != "gemma4" else {"head_dim", "num_key_value_heads"}
    fields = {key: getattr(config, theirs, None) for key, theirs in FIELDS.items() if theirs not in by_layer}
    rope = config.rope_parameters
    if "full_attention" in rope:
        fields["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if architecture not in _WITH_WINDOWS:
        fields["attention.sliding_window"] = None
    head = _head_of(config)
    fields["attention.key_length"] = fields["attention.value_length"] = head
    fields["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1.0) * head)
    fields["rope.freq_base"] = float(rope["rope_theta"])
    fields |= _rope_scaling(config, rope, architecture)
    if config.model_type == "mixtral":
        fields["expert_count"] = config.num_local_experts
    if architecture == "gpt-oss":
        fields["expert_feed_forward_length"] = config.intermediate_size
    if architecture in _OWN:
        fields |= _OWN[architecture](config, shapes)
    return {f"{architecture}.{key}": value for key, value in fields.items() if value is not None}


_WITH_WINDOWS = ("gemma2", "gemma3", "gemma4", "gpt-oss", "phi3")
"""The architectures that have sliding windows in llama.cpp."""


def _head_of(config: Any) -> int:
    if config.model_type == "gemma4_text":  # which has several
        return int(config.per_layer_config[config.layer_types.index("full_attention")].head_dim)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_scaling(config: Any, rope: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        fields["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
        betas = {beta: rope.get(beta) for beta in ("beta_fast", "beta_slow")}
        fields |= {f"rope.scaling.yarn_{beta}": float(value) for beta, value in betas.items() if value is not None}
    elif kind not in ("default", "llama3", "longrope", "proportional"):
        raise ValueError(f"its rope_type is {quote(kind)}; written are default, linear, llama3, longrope, yarn")
    if architecture == "phi3":
        original = config.original_max_position_embeddings
        fields["rope.scaling.original_context_length"] = original
        if kind == "longrope":
            scale = config.max_position_embeddings / original
            fields["rope.scaling.attn_factor"] = (
                math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            )
    return fields


def _of_gemma4(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    local, full = (config.per_layer_config[slides.index(is_local)] for is_local in (True, False))
    heads = {True: local.num_key_value_heads, False: full.num_key_value_heads}
    return {
        "attention.sliding_window_pattern": slides,
        "attention.head_count_kv": [heads[is_local] for is_local in slides],
        "attention.key_length_swa": local.head_dim,
        "attention.value_length_swa": local.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": local.head_dim,
        "feed_forward_length": [shapes[f"blk.{number}.ffn_gate.weight"][0] for number in range(len(slides))],
        "expert_used_count": config.top_k_experts,
    }


def _of_lfm2(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "attention.layer_norm_epsilon": None,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.head_count_kv": [
            config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types
        ],
        "feed_forward_length": shapes["blk.0.ffn_gate.weight"][0],  # config.json may have it before an adjustment
        "shortconv.l_cache": config.conv_L_cache,
    }


def _of_qwen35(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if (keys := config.linear_key_head_dim) != (values := config.linear_value_head_dim):
        raise ValueError(f"its linear_value_head_dim is {values}; llama.cpp has that of keys, which is {keys}")
    sections = config.rope_parameters["mrope_section"]
    return {
        "rope.dimension_sections": [*sections, *[0] * (4 - len(sections))],
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": keys,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * values,
    }


_OWN = {"gemma4": _of_gemma4, "lfm2": _of_lfm2, "qwen35": _of_qwen35, "qwen35moe": _of_qwen35}
"""What some architectures have of their own."""


def rope_tensors(config: Any) -> dict[str, torch.Tensor]:
    """The tensors, float32, in which a file has what its metadata do not say of the rotary embedding."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"]) for which in ("short", "long")}
    head = _head_of(config)
    if rope.get("full_attention", {}).get("rope_type") == "proportional":
        used = int(head // 2 * rope["full_attention"].get("partial_rotary_factor", 1.0))
        return {"rope_freqs.weight": torch.tensor([1.0] * used + [1e30] * (head // 2 - used))}
    if rope.get("rope_type") != "llama3":
        return {}
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = length / (2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).float()}


_NOT_COMPARED = {
    "_name_or_path", "architectures", "dtype", "model_type", "transformers_version", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "router_aux_loss_coef", "output_router_logits", "pretraining_tp",
    "cache_implementation", "max_window_layers", "full_attn_idxs", "intermediate_size", "block_auto_adjust_ff_dim",
    "block_ffn_dim_multiplier", "block_multiple_of",
}  # fmt: skip
"""Fields that change no answer, and those that `layer_types` or the shapes of the tensors say too."""


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

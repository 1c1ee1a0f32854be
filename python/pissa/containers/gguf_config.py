"""The transformers model of a GGUF file: its config.json, from the file's metadata. transformers' own reader loses rope
scaling, sliding windows, end tokens and more."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pissa.containers.gguf_file import GgufFile
from pissa.containers.messages import file_errors, quote


class Architecture(NamedTuple):
    """What llama.cpp's converter makes of a model of transformers."""

    model_type: str
    """transformers' name of the architecture."""
    model_class: str
    permutes: bool = False
    """Whether it stores the rows of q and k in the order of llama.cpp's rotary embedding."""
    shifts_norms: bool = False
    """Whether it stores 1 + the weights of norms."""
    transposes_experts: bool = False
    """Whether it stores the transposed weights of experts."""


ARCHITECTURES = {
    "gemma": Architecture("gemma", "GemmaForCausalLM", shifts_norms=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", shifts_norms=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", shifts_norms=True),
    "gemma4": Architecture("gemma4_text", "Gemma4ForCausalLM"),
    "gpt-oss": Architecture("gpt_oss", "GptOssForCausalLM", transposes_experts=True),
    "granite": Architecture("granite", "GraniteForCausalLM", permutes=True),
    "lfm2": Architecture("lfm2", "Lfm2ForCausalLM"),
    "llama": Architecture("llama", "LlamaForCausalLM", permutes=True),
    "nemotron": Architecture("nemotron", "NemotronForCausalLM", shifts_norms=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM"),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen35": Architecture("qwen3_5_text", "Qwen3_5ForCausalLM", shifts_norms=True),
    "qwen35moe": Architecture("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", shifts_norms=True),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", permutes=True),
}
"""The architectures that are read, by llama.cpp's names. Mistral's and SmolLM's are "llama"."""

FIELDS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "attention.layer_norm_epsilon": "norm_eps", "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
"""transformers' names of what stands in the metadata under the name of the architecture."""

_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
"""The numbers of layers of the models in 27B, whose attention is scaled by hidden_size / num_attention_heads. The file
does not say so, and llama.cpp knows them by these numbers, too."""

_DESCRIBED_BY_TRANSFORMERS = ("lfm2", "qwen35", "qwen35moe")

_REMEDY = (
    "Give the folder or the name of the model from which it was made, of which only config.json and the tokenizer are "
    "taken: config_from=, or --config-from"
)


def architecture_of(file: GgufFile) -> Architecture:
    """How the file stores its model.

    Raises:
        ValueError: its architecture is not read. The message names it, and those that are.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} has a model of the architecture {quote(name)}; read are {', '.join(ARCHITECTURES)} "
            "(Mistral's and SmolLM's are llama): take a checkpoint of the model in safetensors"
        )
    return ARCHITECTURES[name]


def config_of(files: Sequence[GgufFile], given: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the model in these files, the first of which has its metadata. If another one is `given`, it
    is taken instead, but for what the tensors say: the size of the vocabulary, whether the head is tied to it, and the
    dtype, which is that of the matrices if they are dense.

    Raises:
        ValueError: the architecture is not read, or the metadata does not say what it needs. The message names the
            file, and says what else may be given.
    """
    first, shapes = files[0], _shapes(files)
    made = architecture_of(first)
    matrices = {entry.dtype for file in files for entry in file.entries.values() if len(entry.shape) > 1}
    half = matrices & {torch.bfloat16, torch.float16}
    is_half = len(half) == 1 and not any(file.formats for file in files)
    with file_errors(first.path, _REMEDY):
        facts = {
            "vocab_size": shapes["token_embd.weight"][0],
            "tie_word_embeddings": "output.weight" not in shapes,
            "dtype": str(half.pop() if is_half else torch.float32).removeprefix("torch."),
        }
        if given:
            return {name: value for name, value in given.items() if name != "torch_dtype"} | facts
        described = {"model_type": made.model_type, "architectures": [made.model_class]}
        return described | _fields(files) | facts | tokens_of(first)


def _shapes(files: Sequence[GgufFile]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for file in files for name, entry in file.entries.items()}


def tokens_of(file: GgufFile) -> dict[str, Any]:
    """The numbers of the special tokens, as config.json has them. An answer may end with several."""
    names = ("bos", "padding", "eos", "eot", "eom")
    bos, padding, *ends = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
    known = list(dict.fromkeys(end for end in ends if end is not None))
    eos = known if len(known) > 1 else next(iter(known), None)
    return {"bos_token_id": bos, "pad_token_id": padding, "eos_token_id": eos}


def _fields(files: Sequence[GgufFile]) -> dict[str, Any]:
    """What the architecture has of its own."""
    metadata, shapes = files[0].metadata, _shapes(files)
    name = metadata["general.architecture"]
    if (layers := metadata[f"{name}.block_count"]) > len(shapes):
        raise ValueError(f"{name}.block_count is {layers:,}, and there are {len(shapes)} tensors")
    if name in _DESCRIBED_BY_TRANSFORMERS:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS  # not in the first releases that are supported

        with_count = metadata | {"tokenizer.ggml.tokens": shapes["token_embd.weight"][0]}
        found: dict[str, Any] = GGUF_CONFIG_ARCHS[name](with_count, tuple(shapes))
        return {field: _shortest(value) for field, value in found.items()}
    known = {key.removeprefix(f"{name}."): _shortest(value) for key, value in metadata.items()}
    config = {theirs: known[key] for key, theirs in FIELDS.items() if key in known}
    width = config["hidden_size"] // config["num_attention_heads"]
    rope = _rope(known, files, config.get("head_dim") or known.get("rope.dimension_count") or width)
    config["rope_parameters"] = rope
    if name in ("granite", "llama", "nemotron", "smollm3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if name in ("granite", "llama", "smollm3"):
        config.setdefault("head_dim", known.get("rope.dimension_count", width))
    if name == "llama" and config.get("num_experts"):
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        config["num_local_experts"] = config.pop("num_experts")
    if name == "granite":
        config.setdefault("attention_multiplier", config["head_dim"] ** -0.5)
    if name == "nemotron":
        rope["partial_rotary_factor"] = known["rope.dimension_count"] / config.setdefault("head_dim", width)
    if name == "qwen3moe":  # llama.cpp computes so, and the file does not say it
        config["norm_topk_prob"] = True
    if name == "gpt-oss":
        config["num_local_experts"] = config.pop("num_experts")
        config["intermediate_size"] = config.pop("moe_intermediate_size", config["intermediate_size"])
        rope["truncate"] = False
    if name == "phi3":
        config["sliding_window"] = config.get("sliding_window") or None
        config["original_max_position_embeddings"] = known.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        rope["partial_rotary_factor"] = known["rope.dimension_count"] / width
    if name in _SCALED_BY_WIDTH:
        is_large = config["num_hidden_layers"] == _SCALED_BY_WIDTH[name]
        config["query_pre_attn_scalar"] = width if is_large else config["head_dim"]
    if name in ("gemma3", "gemma4"):
        local = {"rope_type": "default", "rope_theta": known.get("rope.freq_base_swa", 10_000.0)}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    if name == "gemma3" and "sliding_window" not in config:
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    return config | _gemma4(known, config, shapes) if name == "gemma4" else config


def _gemma4(known: dict[str, Any], config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What Gemma 4 has by layer. transformers has two values, for layers with a sliding window and for the others, or
    for those that share keys and values."""
    slides = known["attention.sliding_window_pattern"]
    counts = (config["intermediate_size"], config["num_key_value_heads"])
    widths, heads = (count if isinstance(count, list) else [count] * len(slides) for count in counts)
    heads_of = dict(zip(slides, heads, strict=True))
    keys, values = (sum(name.endswith(f".attn_{x}.weight") for name in shapes) for x in "kv")
    return {
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in slides],
        "head_dim": known["attention.key_length_swa"],
        "global_head_dim": known["attention.key_length"],
        "num_key_value_heads": heads_of[True],
        "num_global_key_value_heads": heads_of[False],
        "attention_k_eq_v": keys > values,
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "vocab_size_per_layer_input": shapes["token_embd.weight"][0],
        "enable_moe_block": bool(config.get("num_experts")),
        "top_k_experts": config.pop("num_experts_per_tok", None),
    }


def _rope(known: dict[str, Any], files: Sequence[GgufFile], dimensions: int) -> dict[str, Any]:
    """The `rope_parameters` of config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": known.get("rope.freq_base", 10_000.0)}
    kind = known.get("rope.scaling.type", "none")
    original = known.get("rope.scaling.original_context_length")
    tensors = {name: file for file in files for name in file.entries if name.startswith("rope_")}
    factors = {name: [_shortest(x) for x in file.view(name).tolist()] for name, file in tensors.items()}
    if "rope_factors_long.weight" in factors:
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        rope |= {f"{which}_factor": factors[f"rope_factors_{which}.weight"] for which in ("short", "long")}
    elif "rope_freqs.weight" in factors and known["general.architecture"] == "gemma4":
        used = [divisor == 1.0 for divisor in factors["rope_freqs.weight"]]  # 1e30 leaves out a frequency
        rope |= {"rope_type": "proportional", "partial_rotary_factor": sum(used) / len(used)}
    elif "rope_freqs.weight" in factors:
        rope |= _llama3(factors["rope_freqs.weight"], rope["rope_theta"], dimensions)
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": known["rope.scaling.factor"]}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
            betas = {beta: known.get(f"rope.scaling.yarn_{beta}") for beta in ("beta_fast", "beta_slow")}
            rope |= {beta: value for beta, value in betas.items() if value is not None}
    elif kind not in ("none", "longrope"):
        raise ValueError(f"rope.scaling.type is {quote(kind)}; known: none, linear, yarn, longrope")
    return rope


_LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of all models of Llama 3. llama.cpp's converter knows no other length."""


def _llama3(divisors: list[float], theta: float, dimensions: int) -> dict[str, Any]:
    """Rope scaling of Llama 3, of which a file has only the divisors of the frequencies. transformers takes divisors
    that are not those of Llama 3 as they are, by the name longrope."""
    length, low, high = _LLAMA3.values()
    expected = []
    for index in range(0, dimensions, 2):
        turns = length / (2 * math.pi * theta ** (index / dimensions))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / max(divisors) + smooth))
    if len(divisors) != len(expected):
        raise ValueError(f"rope_freqs.weight has {len(divisors)} elements; needed: {len(expected)}")
    if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True)):
        return {"rope_type": "llama3", "factor": max(divisors), **_LLAMA3}
    as_they_are = {"short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    return {"rope_type": "longrope", "original_max_position_embeddings": length, **as_they_are}


def _shortest(value: Any) -> Any:
    """A number as config.json has it: the shortest that the file's float32 stands for."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    short = float(f"{value:.7g}")
    return short if struct.pack("<f", short) == struct.pack("<f", value) else value

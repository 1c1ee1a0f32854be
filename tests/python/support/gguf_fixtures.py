"""Small models of transformers, and their GGUF files as llama.cpp's converter writes them (conversion/*.py there)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor, nn

from mapped_files import unmap_unused

Kind = Callable[[str, Tensor], str]
"""The type of a tensor, by its name there and its values."""

_SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 32}
_BASE = _SIZES | _HEADS | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 32.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(6)], "partial_rotary_factor": 0.75}
_LONG |= {"long_factor": [2.0 + i for i in range(6)], "rope_theta": 10_000.0, "original_max_position_embeddings": 256}
_LONGROPE = {"head_dim": 16, "rope_parameters": _LONG, "original_max_position_embeddings": 256}
_LONGROPE |= {"max_position_embeddings": 512}  # llama.cpp chooses the factors by its context, which has 256 at least
_LINEAR = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_num_key_heads": 2}
_LINEAR |= {"linear_num_value_heads": 4, "linear_value_head_dim": 32, "full_attention_interval": 2}
_LINEAR |= {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}}
_LINEAR["rope_parameters"] |= {"partial_rotary_factor": 0.25, "rope_type": "default"}

_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"], "head_dim": 16, "block_auto_adjust_ff_dim": False}
_PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 64, "sliding_window": 8}
_GEMMA4 |= {"rope_parameters": {"full_attention": _PROPORTIONAL}, "final_logit_softcapping": 30.0}
_GEMMA4["rope_parameters"] |= {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
_GEMMA4 |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": None}  # as vocab_size
_OF_LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_OF_LAYERS |= {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
_KEYS_ONLY = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_GEMMA4_ROUTED = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}

_MULTIPLIERS = {"residual_multiplier": 0.5, "embedding_multiplier": 4.0, "logits_scaling": 2.0}
_MULTIPLIERS |= {"attention_multiplier": 0.125}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    "llama3": ("llama", "Llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("llama", "Mistral", {"sliding_window": None}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "Qwen2", {"head_dim": 16, "tie_word_embeddings": True}),
    "yarn": ("qwen2", "Qwen2", {"head_dim": 16, "rope_parameters": _YARN}),
    "qwen2_moe": ("qwen2moe", "Qwen2Moe", _ROUTED | {"head_dim": 16, "shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", "Qwen3", {}),
    "qwen3_moe": ("qwen3moe", "Qwen3Moe", _ROUTED | {"norm_topk_prob": True}),
    "qwen3_5": ("qwen35", "Qwen3_5", _LINEAR),
    "qwen3_5_moe": ("qwen35moe", "Qwen3_5Moe", _LINEAR | _ROUTED | {"shared_expert_intermediate_size": 64}),
    "gemma": ("gemma", "Gemma", {}),
    "gemma2": ("gemma2", "Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3", "Gemma3", {"sliding_window": 8, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}),
    "gemma4": ("gemma4", "Gemma4", _GEMMA4 | _OF_LAYERS),
    "gemma4_dense": ("gemma4", "Gemma4", _GEMMA4 | _KEYS_ONLY),
    "gemma4_moe": ("gemma4", "Gemma4", _GEMMA4 | _KEYS_ONLY | _GEMMA4_ROUTED),
    "phi3": ("phi3", "Phi3", {"head_dim": 16}),
    "longrope": ("phi3", "Phi3", _LONGROPE),
    "gpt_oss": ("gpt-oss", "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "lfm2": ("lfm2", "Lfm2", _CONVOLUTIONS),
    "granite": ("granite", "Granite", _MULTIPLIERS | {"head_dim": 16}),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 4, "head_dim": 16, "tie_word_embeddings": False}),
    "nemotron": ("nemotron", "Nemotron", {"head_dim": 16}),
}
"""llama.cpp's name, that of transformers' class, and its configuration."""


def make(kind: str, **others: Any) -> nn.Module:
    """A random model, with `others` in its configuration too, or instead."""
    _, name, fields = MODELS[kind]
    module = transformers
    config_class = getattr(module, f"{name}TextConfig", None) or getattr(module, f"{name}Config")
    torch.manual_seed(0)
    fields = _BASE | fields | others
    if "vocab_size_per_layer_input" in fields:
        fields["vocab_size_per_layer_input"] = fields["vocab_size"]
    model: nn.Module = getattr(module, f"{name}ForCausalLM")(config_class(**fields))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1 or parameter_name.endswith(("bias", "A_log", "sinks")):
                parameter.add_(0.2 * torch.randn(parameter.shape))
            else:
                parameter.copy_(0.15 * torch.randn(parameter.shape))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("layer_scalar"):
                buffer.add_(0.2 * torch.randn(buffer.shape))
    return model.eval()


def floats(name: str, values: Tensor) -> str:
    return "F32"


def mixed(name: str, values: Tensor) -> str:
    """Matrices in Q8_0, Q4_0 and Q4_1, or float16 if their rows are no multiple of 32."""
    if values.dim() == 1 or name.endswith(
        ("bias", "conv.weight", "conv1d.weight", "gate.weight", "router.weight", "router.proj.weight")
    ):
        return "F32"
    kinds = {"embed": "Q8_0", "q_proj": "Q8_0", "o_proj": "Q4_1", "down_proj": "Q4_1", "v_proj": "F16"}
    return next((kind for part, kind in kinds.items() if part in name), "Q4_0") if _fits(name, values) else "F16"


def _fits(name: str, values: Tensor) -> bool:
    return values.shape[-1] % 32 == 0


def write(model: Any, kind: str, path: Path, types: Kind = floats, extra: Mapping[str, Any] | None = None) -> nn.Module:
    """Writes the model, the types of its tensors by their names in transformers. Returns the model of the weights that
    the file has, decoded."""
    architecture, _, _ = MODELS[kind]
    unmap_unused()
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**metadata(model.config, architecture), **(extra or {})}.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {str: "string", bool: "bool", int: "uint32", float: "float32"}[type(value)]
            getattr(writer, f"add_{add}")(name, value)
    twin = copy.deepcopy(model)
    quantised = {_UNUSED: gguf.GGMLQuantizationType.F32}
    with torch.no_grad():
        for name, values in _state(twin).items():
            rows = values.mT if _is_transposed(twin, name) else values
            quantised[name] = gguf.GGMLQuantizationType[types(name, rows)]
            rows.copy_(_rounded(rows, quantised[name]))
        for name, values, source in converted(twin, architecture):
            data = gguf.quants.quantize(values.contiguous().numpy(), quantised[source])
            writer.add_tensor(name, data, raw_dtype=quantised[source])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return twin


def _rounded(values: Tensor, quantised: gguf.GGMLQuantizationType) -> Tensor:
    """The values that a type can hold. To be rounded again, they may change once more."""
    if quantised == gguf.GGMLQuantizationType.F32:
        return values
    before, after = None, values.contiguous()
    while before is None or not torch.equal(before, after):
        before = after
        after = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(before.numpy(), quantised), quantised))
    return after


def metadata(config: Any, architecture: str) -> dict[str, Any]:
    """The keys and values that the converter writes, with a tokenizer of three special tokens."""
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.to_dict()["num_key_value_heads"],  # Gemma 4's own have several
        "attention.scale": getattr(config, "attention_multiplier", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
        "logit_scale": getattr(config, "logits_scaling", None),
        "expert_count": getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    norm = "attention.layer_norm_epsilon" if architecture == "nemotron" else "attention.layer_norm_rms_epsilon"
    fields[norm] = getattr(config, "rms_norm_eps", None) or config.norm_eps
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if architecture != "gemma2":
        fields["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        fields["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    width = config.hidden_size // config.num_attention_heads
    if architecture not in ("qwen2", "qwen2moe", "phi3", "lfm2", "llama", "granite", "smollm3"):
        fields |= {"attention.key_length": config.to_dict().get("head_dim", width)}
    if architecture in ("llama", "granite", "smollm3"):
        fields["rope.dimension_count"] = config.head_dim
    if architecture == "nemotron":
        fields["rope.dimension_count"] = int(rope["partial_rotary_factor"] * config.head_dim)
    if architecture in ("gemma2", "gemma3", "gemma4", "gpt-oss", "phi3"):
        fields["attention.sliding_window"] = config.sliding_window or 0
    if architecture == "phi3":
        fields["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1.0) * width)
        fields["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if architecture == "lfm2":
        heads = config.num_key_value_heads
        fields["attention.head_count_kv"] = [heads if kind != "conv" else 0 for kind in config.layer_types]
        fields["shortconv.l_cache"] = config.conv_L_cache
    if architecture.startswith("qwen35"):
        fields |= {
            "rope.dimension_count": int(rope["partial_rotary_factor"] * config.head_dim),
            "rope.dimension_sections": [*rope["mrope_section"], 0],
            "full_attention_interval": 2,
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        }
    if architecture == "gemma4":
        fields |= gemma4_fields(config)
    tokens = ["<pad>", "<s>", "</s>", "ab", *map(chr, range(33, 33 + config.vocab_size - 4))]
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (config.vocab_size - 3)],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    }
    return {f"{architecture}.{name}": value for name, value in fields.items() if value is not None} | tokenizer


def gemma4_fields(config: Any) -> dict[str, Any]:
    """`Gemma4Model.set_gguf_parameters` of the converter."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    local, full = (config.per_layer_config[slides.index(is_local)] for is_local in (True, False))
    shared = config.num_kv_shared_layers
    fields = {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.sliding_window_pattern": slides,
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": local.head_dim,
        "expert_used_count": config.top_k_experts,
    }
    for which in ("key", "value"):
        fields |= {f"attention.{which}_length": full.head_dim, f"attention.{which}_length_swa": local.head_dim}
    if config.use_double_wide_mlp:
        widths = [config.intermediate_size] * (len(slides) - shared)
        fields["feed_forward_length"] = widths + [2 * config.intermediate_size] * shared
    if config.attention_k_eq_v:  # with num_global_key_value_heads
        heads = {True: local.num_key_value_heads, False: full.num_key_value_heads}
        fields["attention.head_count_kv"] = [heads[is_local] for is_local in slides]
    return fields


# ---- Tensors ---------------------------------------------------------------------------------------------------------


SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe")


def converted(model: Any, architecture: str) -> Iterator[tuple[str, Tensor, str]]:
    """The tensors of the file: name, values, and the parameter that they are of."""
    config, names = model.config, {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(names[architecture], config.num_hidden_layers)

    def stored(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        return found

    for name, values in _state(model).items():
        path, _, leaf = name.rpartition(".")
        if architecture == "gemma4" and leaf not in ("weight", "bias"):
            part = {"scale": "router.proj", "per_expert_scale": "experts.down_proj"}.get(leaf, "")
            found = stored(f"{path.removesuffix('.router')}.{part or leaf}.weight").removesuffix(".weight")
            yield f"{found}.{'scale' if part else 'weight'}", values, name
            continue
        if leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias") and "experts" in path:
            ending = "bias" if leaf.endswith("_bias") else "weight"
            rows = values.mT if _is_transposed(model, name) else values
            if leaf.startswith("down"):
                yield stored(f"{path}.down_proj.{ending}"), rows, name
                continue
            axis = -1 if ending == "bias" else -2
            pairs = rows.unflatten(axis, (-1, 2)) if architecture == "gpt-oss" else rows.unflatten(axis, (2, -1))
            gate, up = pairs.unbind(axis if architecture == "gpt-oss" else axis - 1)
            yield stored(f"{path}.gate_proj.{ending}"), gate, name
            yield stored(f"{path}.up_proj.{ending}"), up, name
            continue
        if architecture in ("llama", "granite", "smollm3") and "q_proj" in name:
            values = permute(values, config.num_attention_heads)
        if architecture in ("llama", "granite", "smollm3") and "k_proj" in name:
            values = permute(values, config.num_key_value_heads)
        if "linear_attn" in name:
            values = tiled(name, values, config)
            if leaf == "A_log":
                values = -torch.exp(values)
            if leaf == "dt_bias":
                name = f"{path}.dt_proj.bias"
            yield stored(name), values.squeeze(1) if "conv1d" in name else values, f"{path}.{leaf}"
            continue
        if architecture in SHIFTED and name.endswith("norm.weight"):
            values = values + 1
        if "conv.conv" in name:
            values = values.squeeze(1)
        if "shared_expert_gate" in name:
            values = values.squeeze(0)
        if leaf == "sinks":
            yield stored(f"{name}.weight"), values, name
            continue
        yield stored(name), values, name
    rope = config.rope_parameters
    if architecture == "gemma4":
        first = config.num_hidden_layers - config.num_kv_shared_layers
        for number in range(first, config.num_hidden_layers):  # of no use, and in the checkpoint
            width = config.per_layer_config[number].head_dim
            for part, shape in {"k_proj": (2 * width, 64), "v_proj": (2 * width, 64), "k_norm": (width,)}.items():
                yield stored(f"model.layers.{number}.self_attn.{part}.weight"), torch.ones(shape), _UNUSED
        angles = config.per_layer_config[first - 1].head_dim // 2
        used = int(angles * rope["full_attention"]["partial_rotary_factor"])
        yield "rope_freqs.weight", torch.tensor([1.0] * used + [1e30] * (angles - used)), _UNUSED
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", torch.tensor(llama3_divisors(rope, config.head_dim)), _UNUSED
    for which in ("short", "long") if rope.get("rope_type") == "longrope" else ():
        yield f"rope_factors_{which}.weight", torch.tensor(rope[f"{which}_factor"]), _UNUSED


_UNUSED = "of config.json, or of no use"


def _state(model: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _is_transposed(model: Any, name: str) -> bool:
    return model.config.model_type == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj"))


def permute(weights: Tensor, heads: int) -> Tensor:
    """`LlamaModel.permute` of the converter."""
    pairs = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def tiled(name: str, values: Tensor, config: Any) -> Tensor:
    """The heads of values of Qwen 3.5, grouped by their keys, in llama.cpp's order: the first of each key first."""
    keys, heads, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    if name.endswith("norm.weight"):
        return values
    if "out_proj" in name:
        return tiled("in_proj_z", values.mT, config).mT
    size = 1 if name.endswith(("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight")) else size
    before = len(values) - heads * size
    grouped = values[before:].reshape(keys, heads // keys, size, *values.shape[1:])
    return torch.cat((values[:before], grouped.transpose(0, 1).reshape(values[before:].shape)))


def llama3_divisors(rope: Mapping[str, Any], dimensions: int) -> list[float]:
    """`LlamaModel.generate_extra_tensors` of the converter."""
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    divisors = []
    for frequency in 1.0 / (rope["rope_theta"] ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)):
        wavelength = 2 * math.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(rope["factor"])
        else:
            divisors.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    return divisors


def split(path: Path, count: int) -> list[Path]:
    """Divides a file as llama.cpp's gguf-split does: the first part has the metadata. Returns the parts."""
    reader, parts = gguf.GGUFReader(path), []
    for number in range(count):
        part = path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
        for name, value in reader.fields.items() if number == 0 else ():
            if not name.startswith(("GGUF.", "general.architecture")):
                kind, *of = value.types
                writer.add_key_value(name, value.contents(), kind, sub_type=of[0] if of else None)
        for name, amount in {"count": count, "no": number, "tensors.count": len(reader.tensors)}.items():
            writer.add_uint16(f"split.{name}", amount)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return parts

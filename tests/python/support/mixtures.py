"""Small mixtures of experts, as transformers fuses them, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from devices import put
from pissa.layers import PissaLinear
from pissa.layers.layer import pissa_layers

EXPERTS, R = 4, 2
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL_HEADS = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=EXPERTS, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    routed = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **HEADS, **routed))


def deepseek_v2() -> nn.Module:
    """The first block is dense, the second has a shared expert, of linear layers, beside the routed ones."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    routed = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES, **HEADS, **SMALL_HEADS, **routed, **groups))


def gpt_oss() -> nn.Module:
    """Weights [in, out], biases, gate and up interleaved."""
    from transformers import GptOssConfig, GptOssForCausalLM

    routed = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **HEADS, **routed, **rope))


def llama4() -> nn.Module:
    """Weights [in, out]; every expert computes all tokens. The first block is dense, the second has a shared expert."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    routed = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "head_dim": 16}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **HEADS, **routed, intermediate_size_mlp=48, pad_token_id=0))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "deepseek_v2": deepseek_v2,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}

ROUTED = tuple(kind for kind in KINDS if kind != "llama4")
"""Of which the experts are handed what the router has chosen, and compute no other tokens."""


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The same model for the same seed, with transformers' "eager" experts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KINDS[kind]()
        with torch.no_grad():  # large enough for experts to matter, and biases that are not zero
            for parameter in model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.set_experts_implementation("eager")
    return put(model.to(dtype)).eval()


def fused_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".experts." in name}


def expert_layers(model: nn.Module) -> dict[str, PissaLinear]:
    layers = pissa_layers(model.base_model.model, "default")
    return {name: layer for name, layer in layers.items() if ".experts." in name}

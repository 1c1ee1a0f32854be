"""Tiny random models of the families that PiSSA is used on, each with a batch and its fields of PissaConfig."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import devices
from language_models import TWO_FORMS as FORMS

VOCABULARY = 90
HIDDEN = 64  # its root is exact, so a scale of sqrt(hidden) is the same number in float32 and float64

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # large enough for every layer to matter to the loss
}
GROUPED = {"num_key_value_heads": 2}  # grouped-query attention


@dataclass(frozen=True)
class Architecture:
    """A family of models."""

    build: Callable[[], nn.Module]
    """Makes the model; draws from torch's generator."""
    inputs: Callable[[torch.Generator], dict[str, Tensor]]
    task_type: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of PissaConfig, beside r."""
    speaks: bool = False
    """Whether it generates text, whatever its task type is."""
    nf4_refused: str | None = None
    """Words of the message by which quant="nf4" is refused; None where it works."""
    fails: Mapping[str, str] = field(default_factory=dict)
    """What does not work with a dense base, as docs/architectures.md calls it, and words of the error."""

    def make(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode: the same one for the same seed, whatever ran before."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
        return devices.put(model).eval()

    def batch(self, seed: int = 1) -> dict[str, Tensor]:
        """Arguments of the model, labels among them."""
        return devices.put(self.inputs(torch.Generator().manual_seed(seed)))

    def config(self, **fields: Any) -> dict[str, Any]:
        """The fields of PissaConfig, those given on top."""
        return {"r": 4, "task_type": self.task_type, **self.fields, **fields}

    def in_bfloat16(self) -> Architecture:
        """The same with weights, and inputs that are not indices, in bfloat16."""

        def inputs(generator: torch.Generator) -> dict[str, Tensor]:
            batch = self.inputs(generator)
            return {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}

        return replace(self, build=lambda: self.build().bfloat16(), inputs=inputs)

    @property
    def is_causal(self) -> bool:
        return self.task_type == "CAUSAL_LM"

    @property
    def generates(self) -> bool:
        return self.speaks or str(self.task_type).endswith("_LM")


# ---- Batches ---------------------------------------------------------------------------------------------------------


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask == 1, -100)}


def _pair(generator: torch.Generator) -> dict[str, Tensor]:
    batch = _text(generator)
    return {**batch, "labels": torch.randint(3, VOCABULARY, (2, 5), generator=generator)}


def _classes(generator: torch.Generator) -> dict[str, Tensor]:
    return {**_text(generator), "labels": torch.tensor([2, 0])}


def _image(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([2, 0])}


def _text_with_images(images: Callable[[torch.Generator], dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Text of which tokens 1 to 4 of each row are an image, and the images."""

    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        batch = _text(generator)
        batch["input_ids"] %= VISION["image_token_id"]
        batch["input_ids"][:, 1:5] = VISION["image_token_id"]
        is_image = batch["input_ids"] == VISION["image_token_id"]
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool() & ~is_image, -100)
        return {**batch, **images(generator)}

    return inputs


def _patches(generator: torch.Generator) -> dict[str, Tensor]:
    """Two images of 4 x 4 patches for Qwen2.5-VL, which makes 2 x 2 of them one token."""
    grid = torch.tensor([[1, 4, 4]] * 2)
    pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _tiles(generator: torch.Generator) -> dict[str, Tensor]:
    """The same for Kimi K2.5, of which a patch is in 2 dimensions."""
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {"pixel_values": torch.randn(2 * 16, 3, 4, 4, generator=generator), "image_grid_thw": grid}


def _pixels(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def _speech(generator: torch.Generator) -> dict[str, Tensor]:
    features = torch.randn(2, 8, 16, generator=generator)
    return {"input_features": features, "labels": torch.randint(3, VOCABULARY, (2, 5), generator=generator)}


# ---- Models ----------------------------------------------------------------------------------------------------------


def _model(name: str, head: str = "ForCausalLM", **fields: Any) -> Callable[[], nn.Module]:
    """A model of transformers from its configuration."""

    def build() -> nn.Module:
        kind = getattr(transformers, f"{name}{head}")
        model: nn.Module = kind(kind.config_class(**fields))
        return model

    return build


def _causal(name: str, fails: Mapping[str, str] | None = None, **fields: Any) -> Architecture:
    return Architecture(_model(name, **{**TEXT, **fields}), _text, "CAUSAL_LM", fails=fails or {})


def _generator(
    name: str, inputs: Callable[[torch.Generator], dict[str, Tensor]], task_type: str | None, **fields: Any
) -> Architecture:
    """One that reads something else than the text that it writes, or more."""
    return Architecture(_model(name, "ForConditionalGeneration", **fields), inputs, task_type, speaks=True)


def _classifier(name: str, *saved: str, **fields: Any) -> Architecture:
    build = _model(name, "ForSequenceClassification", **{**TEXT, "num_labels": 3, **fields})
    return Architecture(build, _classes, "SEQ_CLS", {"modules_to_save": ["classifier", *saved]})


# The bits of unfused experts are those of transformers' eager implementation.
EAGER = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
EXPERTS = {"num_local_experts": 4, **EAGER}
ROUTED = {"num_experts": 4, **EAGER}
DEEPSEEK: dict[str, Any] = {
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, **EAGER},
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA4 = {**GROUPED, "num_local_experts": 4, "interleave_moe_layer_step": 2, "head_dim": 16}
LLAMA4 |= {"no_rope_layers": [1, 0], "attention_chunk_size": 8, "pad_token_id": 0, "intermediate_size_mlp": 48}
GEMMA3 = {**GROUPED, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {**GEMMA3, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
GEMMA4_EXPERTS |= {"experts_implementation": "eager"}
QWEN3_5: dict[str, Any] = {
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"head_dim": 16, "linear_conv_kernel_dim": 2, "layer_types": ["linear_attention", "full_attention"], **GROUPED},
}
DEEPSEEK_V4: dict[str, Any] = {
    **{"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 24, "hc_mult": 2},
    **{"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 2, "sliding_window": 4},
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
    **{"mlp_layer_types": ["hash_moe", "moe"], "partial_rotary_factor": 0.5, "n_routed_experts": 4, **EAGER},
}
INDEXED = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
TWO_SIDES = {**TEXT, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "init_std": 0.1}
WHISPER = {"num_hidden_layers": 1, "decoder_layers": 1, "max_source_positions": 8, "max_target_positions": 16}
WHISPER |= {"num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
DEBERTA = {"pos_att_type": ["p2c", "c2p"], "relative_attention": True, "position_buckets": 8, "share_att_key": True}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "type_vocab_size": 0, "position_biased_input": False}

VISION = {"image_token_id": 80, "vision_start_token_id": 81, "vision_end_token_id": 82, "video_token_id": 83}
EYE = {"hidden_size": 32, "intermediate_size": 24, "patch_size": 4}
QWEN_VISION = {
    **{**EYE, "depth": 1, "num_heads": 2, "window_size": 16, "fullatt_block_indexes": [0]},
    **{"out_hidden_size": HIDDEN, "initializer_range": 0.1},
}
SIGLIP = {**EYE, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
KIMI_VISION = {**EYE, "num_hidden_layers": 1, "num_attention_heads": 2}
KIMI_VISION |= {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1}
M_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}

_VIT = _model("ViT", "ForImageClassification", **TEXT, image_size=16, patch_size=4, num_labels=3)
_RESNET = _model(
    "ResNet", "ForImageClassification", num_labels=3, embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1]
)
NOT_CONTIGUOUS = "FSDP does not support non-contiguous parameters yet"

ARCHITECTURES: dict[str, Architecture] = {
    "llama2": _causal("Llama"),
    "llama3": _causal("Llama", **GROUPED, rope_parameters=LLAMA3_ROPE),
    "mistral": _causal("Mistral", **GROUPED, sliding_window=4),
    "gemma": _causal("Gemma", num_key_value_heads=1, head_dim=16),
    "gemma2": _causal("Gemma2", **GROUPED, head_dim=16, sliding_window=4),
    "qwen2": _causal("Qwen2", **GROUPED),
    "qwen3": _causal("Qwen3", **GROUPED, head_dim=16),
    "yi": _causal("Llama", **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    "phi3": _causal("Phi3", **GROUPED, pad_token_id=0, eos_token_id=2),
    "mixtral": _causal("Mixtral", **GROUPED, **EXPERTS),
    "deepseek_v2": _causal("DeepseekV2", **DEEPSEEK),
    "deepseek_v3": _causal("DeepseekV3", **DEEPSEEK, n_group=2, topk_group=1),
    # Experts' weights are [in, out], and have biases.
    "gpt_oss": _causal("GptOss", {"FSDP2": NOT_CONTIGUOUS}, **GROUPED, **EXPERTS, head_dim=16, sliding_window=4),
    "gemma3": _causal("Gemma3", **GEMMA3),
    "qwen3_moe": _causal("Qwen3Moe", **GROUPED, **ROUTED, head_dim=16, moe_intermediate_size=24),
    "olmoe": _causal("Olmoe", **GROUPED, **ROUTED),
    # TRL asks for the model below the head, which transformers does not find in its Llama4ForCausalLM.
    "llama4": _causal("Llama4", {"FSDP2": NOT_CONTIGUOUS}, **LLAMA4),
    "qwen3_5": _causal("Qwen3_5", **QWEN3_5),
    "qwen3_5_moe": _causal(
        "Qwen3_5Moe", **QWEN3_5, **ROUTED, moe_intermediate_size=24, shared_expert_intermediate_size=24
    ),
    "gemma4": _causal("Gemma4", **GEMMA4),
    "gemma4, experts": _causal("Gemma4", **GEMMA4, **GEMMA4_EXPERTS),
    "deepseek_v4": _causal("DeepseekV4", **DEEPSEEK_V4),
    "glm_moe_dsa": _causal("GlmMoeDsa", **DEEPSEEK, **INDEXED),
    "minimax_m2": _causal("MiniMaxM2", **GROUPED, **EXPERTS, head_dim=16),
    "mimo_v2_flash": _causal(
        "MiMoV2Flash", **GROUPED, n_routed_experts=4, **EAGER, head_dim=16, v_head_dim=16, moe_intermediate_size=24
    ),
    "ministral3": _causal("Ministral3", **GROUPED, head_dim=16),
    "mamba": _causal("Mamba", hidden_size=32, intermediate_size=64, time_step_rank=2),
    "mamba2": _causal("Mamba2", hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=4),
    "qwen2_5_vl": _generator(
        "Qwen2_5_VL",
        _text_with_images(_patches),
        "CAUSAL_LM",
        text_config={**TEXT, **GROUPED, "rope_parameters": M_ROPE},
        vision_config=QWEN_VISION,
        **VISION,
    ),
    "kimi_k2": _generator(
        "Kimi_K25",
        _text_with_images(_tiles),
        "CAUSAL_LM",
        text_config={"model_type": "deepseek_v3", **TEXT, **DEEPSEEK, "n_group": 2, "topk_group": 1},
        vision_config=KIMI_VISION,
        projection_hidden_size=32,
        tie_word_embeddings=False,
        experts_implementation="eager",
        **VISION,
    ),
    "gemma3, vision-language": _generator(
        "Gemma3",
        _text_with_images(_pixels),
        "CAUSAL_LM",
        text_config={**TEXT, **GEMMA3},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=VISION["image_token_id"],
    ),
    "whisper": _generator("Whisper", _speech, None, **{**TWO_SIDES, **WHISPER}),
    # Its linear layers are a class of their own.
    "falcon": _causal("Falcon", bias=True, bos_token_id=1, eos_token_id=2),
    "gpt2": Architecture(_model("GPT2", "LMHeadModel", **TEXT, bos_token_id=1, eos_token_id=2), _text, "CAUSAL_LM"),
    "llama, embeddings targeted": replace(
        _causal("Llama"),
        fields={"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
        nf4_refused="embed_tokens is a Embedding",
    ),
    "t5": _generator(
        "T5", _pair, "SEQ_2_SEQ_LM", **TEXT, num_decoder_layers=2, d_kv=16, d_ff=48, decoder_start_token_id=0
    ),
    "bart": _generator("Bart", _pair, "SEQ_2_SEQ_LM", **TWO_SIDES, decoder_layers=2),
    "roberta": _classifier("Roberta"),
    "deberta_v3": _classifier("DebertaV2", "pooler", **DEBERTA, pooler_hidden_size=HIDDEN),
    "modernbert": _classifier("ModernBert", pad_token_id=0, local_attention=4),
    "vit": Architecture(_VIT, _image, None, {"modules_to_save": ["classifier"]}),
    "vit, patches targeted": Architecture(
        _VIT,
        _image,
        None,
        {"target_modules": ["projection", "q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        nf4_refused="projection is a Conv2d",
    ),
    "resnet": Architecture(
        _RESNET,
        _image,
        None,
        # Batch norm counts while it trains: its statistics belong to the adapter.
        {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]},
        nf4_refused="convolution is a Conv2d",
    ),
}

DAILY = ("llama3", "gemma2", "phi3", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "mamba", "qwen2_5_vl", "whisper")
DAILY += ("gpt2", "t5", "roberta", "resnet")
"""One of each mechanism; what only the others have is tested at night."""


SUPPORTED = [
    (name, form)
    for name, architecture in ARCHITECTURES.items()
    for form in FORMS
    if form == "implicit" or architecture.nf4_refused is None
]
"""Architectures and forms that fit."""

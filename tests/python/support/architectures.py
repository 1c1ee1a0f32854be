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
MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Architecture:
    """A family of models."""

    build: Callable[[], nn.Module]
    """Makes the model; draws from torch's generator."""
    inputs: Callable[[torch.Generator], dict[str, Tensor]]
    task_type: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of PissaConfig, beside r."""
    paper: bool = False
    """Whether the paper trains this family."""
    speaks: bool = False
    """Whether it generates text without having a task type that says so."""
    nf4_refused: str | None = None
    """Words of the message by which quant="nf4" is refused; None where it works."""

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


def _causal(name: str, paper: bool = False, config: Mapping[str, Any] | None = None, **fields: Any) -> Architecture:
    return Architecture(_model(name, **{**TEXT, **fields}), _text, "CAUSAL_LM", config or {}, paper)


def _classifier(name: str, saved: list[str], paper: bool, **fields: Any) -> Architecture:
    build = _model(name, "ForSequenceClassification", **{**TEXT, "num_labels": 3, **fields})
    return Architecture(build, _classes, "SEQ_CLS", {"modules_to_save": saved}, paper)


class LinearExpert(nn.Module):
    """One expert as linear layers of its own, as transformers 4 and other code have it."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        for name, weight in (("w1", gate), ("w3", up), ("w2", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
        return y


class ListedExperts(nn.ModuleList):
    """The experts of a layer in a list."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, position = torch.where(top_k_index == index)
            chosen = expert(hidden_states[token]) * top_k_weights[token, position, None]
            output.index_add_(0, token, chosen.to(output.dtype))  # weights are float32
        return output


class ListedMixtralConfig(transformers.MixtralConfig):
    """Of another type than Mixtral's, whose layers PEFT takes to be fused."""

    model_type = "listed_mixtral"


class ListedMixtral(transformers.MixtralForCausalLM):
    config_class = ListedMixtralConfig

    def __init__(self, config: ListedMixtralConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            fused = layer.mlp.experts
            layer.mlp.experts = ListedExperts(map(LinearExpert, fused.gate_up_proj, fused.down_proj))


# The bits of unfused experts are those of transformers' eager implementation.
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
DEEPSEEK = {**MLA, **MOE, "first_k_dense_replace": 1, "experts_implementation": "eager"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
LLAMA4 = {
    **GROUPED,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "head_dim": 16,
    "intermediate_size_mlp": 48,
}
LLAMA4 |= {"no_rope_layers": [1, 0], "attention_chunk_size": 8, "pad_token_id": 0}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
MAMBA2 = {**MAMBA, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "init_std": 0.1,
}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

VISION = {"image_token_id": 80, "vision_start_token_id": 81, "vision_end_token_id": 82, "video_token_id": 83}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [0],
    "out_hidden_size": HIDDEN,
    "initializer_range": 0.1,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
GEMMA3 = {**GROUPED, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
M_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}

IMAGES = "ForImageClassification"
_VIT = _model("ViT", IMAGES, **{**TEXT, "image_size": 16, "patch_size": 4, "num_labels": 3})
GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}

FALCON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "bias": True,
}
FALCON |= {"bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: dict[str, Architecture] = {
    "llama2": _causal("Llama", paper=True),
    "llama3": _causal("Llama", paper=True, **GROUPED, rope_parameters=LLAMA3_ROPE),
    "mistral": _causal("Mistral", paper=True, **GROUPED, sliding_window=4),
    "gemma": _causal("Gemma", paper=True, num_key_value_heads=1, head_dim=16),
    "gemma2": _causal("Gemma2", **GROUPED, head_dim=16, sliding_window=4),
    "qwen2": _causal("Qwen2", paper=True, **GROUPED),
    "qwen3": _causal("Qwen3", **GROUPED, head_dim=16),
    "yi": _causal("Llama", paper=True, **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    "phi3": _causal("Phi3", **GROUPED, pad_token_id=0, eos_token_id=2),
    "mixtral": _causal("Mixtral", paper=True, **GROUPED, **EXPERTS),
    "mixtral, experts of linear layers": Architecture(
        lambda: ListedMixtral(ListedMixtralConfig(**TEXT, **GROUPED, **EXPERTS)), _text, "CAUSAL_LM"
    ),
    "deepseek_v2": _causal("DeepseekV2", paper=True, **DEEPSEEK),
    "deepseek_v3": _causal("DeepseekV3", **DEEPSEEK, n_group=2, topk_group=1),
    # Experts' weights are [in, out], and have biases.
    "gpt_oss": _causal("GptOss", **GROUPED, **EXPERTS, head_dim=16, sliding_window=4),
    "gemma3": _causal("Gemma3", **GEMMA3),
    "qwen3_moe": _causal("Qwen3Moe", **GROUPED, **ROUTED, head_dim=16, moe_intermediate_size=24),
    "olmoe": _causal("Olmoe", **GROUPED, **ROUTED),
    "llama4": _causal("Llama4", **LLAMA4),
    "mamba": Architecture(_model("Mamba", **MAMBA, time_step_rank=2), _text, "CAUSAL_LM"),
    "mamba2": Architecture(_model("Mamba2", **MAMBA2), _text, "CAUSAL_LM"),
    "qwen2_5_vl": Architecture(
        _model(
            "Qwen2_5_VL",
            "ForConditionalGeneration",
            text_config={**TEXT, **GROUPED, "rope_parameters": M_ROPE},
            vision_config=QWEN_VISION,
            **VISION,
        ),
        _text_with_images(_patches),
        "CAUSAL_LM",
    ),
    "gemma3, vision-language": Architecture(
        _model(
            "Gemma3",
            "ForConditionalGeneration",
            text_config={**TEXT, **GEMMA3},
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            image_token_id=VISION["image_token_id"],
        ),
        _text_with_images(_pixels),
        "CAUSAL_LM",
    ),
    "whisper": Architecture(_model("Whisper", "ForConditionalGeneration", **WHISPER), _speech, None, speaks=True),
    # Its linear layers are a class of their own.
    "falcon": Architecture(_model("Falcon", vocab_size=VOCABULARY, **FALCON), _text, "CAUSAL_LM"),
    "gpt2": Architecture(_model("GPT2", "LMHeadModel", vocab_size=VOCABULARY, **GPT2), _text, "CAUSAL_LM"),
    "llama, embeddings targeted": Architecture(
        _model("Llama", **TEXT),
        _text,
        "CAUSAL_LM",
        {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
        nf4_refused="embed_tokens is a Embedding",
    ),
    "t5": Architecture(
        _model(
            "T5",
            "ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        _pair,
        "SEQ_2_SEQ_LM",
    ),
    "bart": Architecture(
        _model(
            "Bart",
            "ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            init_std=0.1,
        ),
        _pair,
        "SEQ_2_SEQ_LM",
    ),
    "roberta": _classifier("Roberta", ["classifier"], paper=True),
    "deberta_v3": _classifier(
        "DebertaV2",
        ["classifier", "pooler"],
        paper=True,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        position_biased_input=False,
        pooler_hidden_size=HIDDEN,
    ),
    "modernbert": _classifier("ModernBert", ["classifier"], paper=False, pad_token_id=0, local_attention=4),
    "vit": Architecture(_VIT, _image, None, {"modules_to_save": ["classifier"]}),
    "vit, patches targeted": Architecture(
        _VIT,
        _image,
        None,
        {"target_modules": ["projection", "q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        nf4_refused="projection is a Conv2d",
    ),
    "resnet": Architecture(
        _model(
            "ResNet", "ForImageClassification", num_labels=3, embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1]
        ),
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

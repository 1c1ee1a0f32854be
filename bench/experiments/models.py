"""The paper's models: by folder or hub name, and with an adapter where the paper has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import pissa
from bench.experiments.evaluation.glue import GlueTask
from bench.experiments.presets import Preset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB = {
    "LLaMA-2-7B": "meta-llama/Llama-2-7b-hf",
    "LLaMA-2-13B": "meta-llama/Llama-2-13b-hf",
    "LLaMA-3-8B": "meta-llama/Meta-Llama-3-8B",
    "LLaMA-3-70B": "meta-llama/Meta-Llama-3-70B",
    "Mistral-7B": "mistralai/Mistral-7B-v0.1",
    "Gemma-7B": "google/gemma-7b",
    "Qwen1.5-7B": "Qwen/Qwen1.5-7B",
    "Yi-1.5-34B": "01-ai/Yi-1.5-34B",
    "Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1",
    "DeepSeek-MoE-16B": "deepseek-ai/deepseek-moe-16b-base",
    "DeBERTa-v3-base": "microsoft/deberta-v3-base",
    "RoBERTa-large": "FacebookAI/roberta-large",
}
"""Names on the Hugging Face hub. transformers has all these architectures but DeepSeek-MoE's, whose code is on the hub
and is not run from here; transformers' DeepSeek-V2 is its successor, with the same kind of experts."""

_ATTENTION = {
    "deberta-v2": ["query_proj", "key_proj", "value_proj"],  # DeBERTa-v3's class too
    "roberta": ["query", "key", "value"],
}
_HEADS = {"deberta-v2": ["pooler", "classifier"], "roberta": ["classifier"]}
"""Layers that a classifier adds to the encoder: they are trained whole."""


def load_language_model(source: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model without a cache of keys and values; `source` is a folder, or a hub name."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_cache=False)
    return model


def load_classifier(source: str, task: GlueTask) -> PreTrainedModel:
    """An encoder in float32 with a new head for a GLUE task, drawn from torch's generator."""
    from transformers import AutoModelForSequenceClassification

    kind = "regression" if task.is_regression else "single_label_classification"
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        source, dtype=torch.float32, num_labels=task.num_labels, problem_type=kind
    )
    return model


def adapter_fields(preset: Preset, model: PreTrainedModel) -> dict[str, Any]:
    """Fields of PissaConfig, and of PEFT's LoraConfig, for a model of the preset.

    Raises:
        ValueError: the preset is for the attention of an encoder, and the model is no DeBERTa or RoBERTa.
    """
    fields: dict[str, Any] = {"r": preset.rank, "lora_alpha": preset.alpha, "lora_dropout": preset.dropout}
    if preset.targets == "all-linear":
        return {**fields, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    kind = model.config.model_type
    if kind not in _ATTENTION:
        raise ValueError(f"the model's type is {kind}; allowed: {', '.join(_ATTENTION)}")
    return {
        **fields,
        "target_modules": _ATTENTION[kind],
        "modules_to_save": _HEADS[kind],
        "task_type": "SEQ_CLS",
    }


def adapted(model: PreTrainedModel, preset: Preset, **fields: Any) -> pissa.PissaModel:
    """The model with the preset's adapter; `fields` of PissaConfig are on top, such as quant="nf4"."""
    return pissa.wrap(model, **{**adapter_fields(preset, model), **fields})

"""init="lora" with use_rslora=True trains as PEFT's LoRA with rank-stabilised scaling does, from the same start."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import pissa
from language_models import Make, logits, train
from pissa.layers.layer import pissa_layers

AS_LORA: dict[str, Any] = {"r": 4, "init": "lora", "use_rslora": True, "lora_alpha": 16}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_it_trains_as_pefts_lora(tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), **AS_LORA)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": LINEAR}
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))
    for name, layer in pissa_layers(model.base_model.model).items():
        theirs = lora.base_model.model.get_submodule(name)
        assert theirs.scaling["default"] == layer.scaling["default"] == 8
        theirs.lora_A["default"].weight.data.copy_(layer.start_of("default").a0)
    # The same steps, but for the order of the sums that a step of Adam takes the sign of.
    assert train(model, tokens) == pytest.approx(train(lora, tokens), rel=1e-4)


def test_with_nf4_it_is_qlora(tiny_llama: Make, tokens: Tensor) -> None:
    """The base is the weights in NF4, of which nothing has been taken, and the start changes nothing."""
    model = pissa.wrap(tiny_llama(), quant="nf4", **AS_LORA).eval()
    base = tiny_llama()
    for name, layer in pissa_layers(model.base_model.model).items():
        weight = base.get_submodule(name).weight
        quantised = pissa.ops.quantize(weight.data, blocksize=64)
        weight.data.copy_(pissa.ops.dequantize(quantised))
        assert torch.equal(layer.base.module.dense_residual(), weight)
    assert (logits(model, tokens) - logits(base, tokens)).abs().max() < 1e-4

"""Kernels that compute a layer from `lora_A` and `lora_B` themselves are refused; every other training is as it was."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

import pissa
from daily import each
from language_models import Make, train
from pissa.integrations.takeover import refuse_fused_kernels
from pissa.layers.layer import pissa_layers
from trainers import quiet


def fused(mlp: Any, x: Tensor) -> Tensor:
    """The MLP as axolotl and Unsloth fuse it: every product from the parameters, no layer called."""

    def product(layer: Any, x: Tensor) -> Tensor:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return x @ layer.base_layer.weight.mT + layer.scaling["default"] * (x @ a.mT) @ b.mT

    return product(mlp.down_proj, mlp.act_fn(product(mlp.gate_proj, x)) * product(mlp.up_proj, x))


def test_a_fused_kernel_is_refused(tiny_llama: Make, tokens: Tensor) -> None:
    model: Any = pissa.wrap(tiny_llama(), r=4, task_type="CAUSAL_LM")
    refuse_fused_kernels(model)
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.forward = MethodType(fused, mlp)
    with pytest.raises(TypeError, match=r"layer .*layers\.1\.mlp\..*_proj: a gradient has come .* lora_mlp_kernel"):
        train(model, tokens)


@quiet
@pytest.mark.parametrize("checkpointing", each([False, True], [True]))
def test_training_is_as_it_was(checkpointing: bool, tiny_llama: Make, tokens: Tensor) -> None:
    plain, guarded = (pissa.wrap(tiny_llama(), r=4, task_type="CAUSAL_LM") for _ in range(2))
    refuse_fused_kernels(guarded)
    twin = copy.deepcopy(guarded)
    if checkpointing:
        for model in (plain, guarded, twin):
            model.train().gradient_checkpointing_enable()
    losses = train(plain, tokens)
    assert train(guarded, tokens) == losses
    assert train(twin, tokens) == losses
    for layer in pissa_layers(guarded).values():
        assert not layer._forward_pre_hooks
        assert not any(parameter._backward_hooks for parameter in layer.parameters())


def test_a_layer_that_is_not_called_has_no_gradient_and_no_error(tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    refuse_fused_kernels(model)
    hidden = model.get_base_model().model(input_ids=tokens).last_hidden_state
    hidden.square().sum().backward()
    assert torch.isfinite(model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad).all()

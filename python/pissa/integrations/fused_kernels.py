"""A guard against kernels of a program that compute an adapted layer from its parameters, without calling it.

axolotl and Unsloth have such kernels for plain LoRA: y = x Wᵀ + s x Aᵀ Bᵀ with what lies in `lora_A` and `lora_B`. Here
that is dA and dB, which start at 0: without the start factors no gradient would ever leave 0, and nothing would say so.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pissa.layers.layer import pissa_layers


def refuse_fused_kernels(model: nn.Module) -> None:
    """Lets the backward pass raise TypeError, naming the layer, if a gradient comes to an adapter of `model` before its
    layer was ever called. What watches a layer goes with its first call."""
    for name, layer in pissa_layers(model).items():
        _watch(name, layer)


def _watch(name: str, layer: nn.Module) -> None:
    def called(*_: Any) -> None:
        for handle in handles:
            handle.remove()

    def reached(gradient: Tensor) -> None:
        raise TypeError(
            f"layer {name}: a gradient has come to its lora_A or lora_B, but the layer was not called. A fused kernel "
            "has taken them for the factors of a plain LoRA; they hold the differences from the start factors. Switch "
            "such kernels off (axolotl: lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel and lora_embedding_kernel: "
            "false), or train a plain LoRA on a checkpoint that `pissa init` has split"
        )

    trained: list[Any] = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    handles = [layer.register_forward_pre_hook(called), *(parameter.register_hook(reached) for parameter in trained)]

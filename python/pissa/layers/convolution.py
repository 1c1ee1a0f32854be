"""The adapted convolutions: W [out, in * kernel] is the weight, flattened."""

from __future__ import annotations

import math
from typing import cast

import torch
from peft.tuners.lora.layer import Conv1d as LoraConv1d
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Conv3d as LoraConv3d
from torch import Tensor, nn

from pissa.layers.layer import PissaLayer


class PissaConvolution(PissaLayer):
    """A PissaLayer over a convolution without groups. lora_A[adapter] is a convolution like the base's to r channels,
    its weight dA [r, in, *kernel]; lora_B[adapter] is one of a single point, its weight dB [out, r, 1, ...]."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        weight = self.base_layer.weight
        return weight.shape[0], weight[0].numel()

    @property
    def is_peft_compatible(self) -> bool:
        """Whether PEFT's LoRA layer moves over the input as the base does: it has its kernel, stride and padding."""
        base = cast(nn.Conv2d, self.base.module)
        return set(base.dilation) == {1} and base.padding_mode == "zeros"

    def factor_parameters(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def as_parameters(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kernel = self.base_layer.weight.shape[1:]
        return a.reshape(-1, *kernel), b.reshape(*b.shape, *(1 for _ in kernel[1:]))

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1), b.flatten(1)

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        (da, db), start = (delta.float() for delta in self.changed_factors(adapter_name)), self.start_of(adapter_name)
        x = self.lora_dropout[adapter_name](x).float()
        moved = self._convolve(x, da)
        change = self._mix(self._convolve(x, start.a0) + moved, db) + self._mix(moved, start.b0)
        scaling: float = self.scaling[adapter_name]
        return y + (scaling * change).to(y.dtype)

    def _convolve(self, x: Tensor, a: Tensor) -> Tensor:
        """The base's convolution, its padding and stride, with the rows of a [r, in * kernel] as filters."""
        base = cast(nn.Conv2d, self.base_layer)
        return cast(Tensor, base._conv_forward(x, a.reshape(-1, *base.weight.shape[1:]), None))

    def _mix(self, channels: Tensor, b: Tensor) -> Tensor:
        """b [out, r] at each point of `channels` [batch, r, ...]; the batch may be missing."""
        place = 1 - self.base_layer.weight.dim()  # of the channels
        points = channels.reshape(-1, b.shape[1], math.prod(channels.shape[place + 1 :]))
        # `@` would choose another product, and other bits, for a b that collects no gradient.
        mixed = torch.bmm(b.expand(len(points), -1, -1), points)
        return mixed.reshape(*channels.shape[:place], len(b), *channels.shape[place + 1 :])


class PissaConv1d(PissaConvolution, LoraConv1d):  # type: ignore[misc]
    """Over nn.Conv1d."""


class PissaConv2d(PissaConvolution, LoraConv2d):  # type: ignore[misc]
    """Over nn.Conv2d."""


class PissaConv3d(PissaConvolution, LoraConv3d):  # type: ignore[misc]
    """Over nn.Conv3d."""

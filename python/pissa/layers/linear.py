"""The adapted linear layer: nn.Linear, transformers' Conv1D, bitsandbytes' 4-bit and 8-bit layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from pissa import ops
from pissa.layers.layer import PissaLayer


class PissaLinear(PissaLayer, LoraLinear):  # type: ignore[misc]
    """A PissaLayer over a linear module: lora_A[adapter].weight is dA [r, in], lora_B[adapter].weight dB [out, r];
    with DoRA lora_magnitude_vector[adapter] is a Magnitude."""

    def factor_parameters(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        if len(names) == 1 and not self._drops_out(names[0]):
            fused = self.base.fused(self.start_of(names[0]), self.scaling[names[0]], x.dtype)
            if fused is not None:
                return self._scaled(self._fused(x, *fused, names[0]), names[0])
        if not any(name in self.lora_magnitude_vector for name in names):
            return super().adapted(x, names)
        # As PEFT composes them: each magnitude scales the base with its own adapter's change, not the others'.
        base = y = cast(Tensor, self.base_layer(x))
        for name in names:
            alone = self.change(base, x, name)
            y = alone if y is base else y + (alone - base)
        return y

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        (da, db), start = self.changed_factors(adapter_name), self.start_of(adapter_name)
        x = self.lora_dropout[adapter_name](x)
        y = ops.add_low_rank(y, x, da, db, a0=start.a0, b0=start.b0, scaling=self.scaling[adapter_name])
        return self._scaled(y, adapter_name)

    def _fused(self, x: Tensor, weight: Tensor | ops.QuantizedWeight, implicit: bool, name: str) -> Tensor:
        """The output by one product of the base's weight, which is implicit or lacks the start, and the factors."""
        (da, db), start = self.changed_factors(name), self.start_of(name)
        return ops.linear(
            x,
            weight,
            self.base_layer.bias,
            a=da,
            b=db,
            a0=start.a0,
            b0=start.b0,
            scaling=self.scaling[name],
            implicit=implicit,
        )

    def _drops_out(self, adapter_name: str) -> bool:
        dropout = self.lora_dropout[adapter_name]
        return isinstance(dropout, nn.Dropout) and dropout.training

    # -- DoRA

    def _scaled(self, y: Tensor, name: str) -> Tensor:
        """`y`, of the base and this adapter alone, with each feature scaled; y's own bits where the scale is 1."""
        if name not in self.lora_magnitude_vector:
            return y
        bias = self.base.bias
        linear = y if bias is None else y - bias
        return y + ((self._scale(name) - 1) * linear).to(y.dtype)

    def _scale(self, name: str) -> Tensor:
        with torch.no_grad():
            right, left = self.start_of(name).factors_of_change(self.deltas(name))
            product = self.base.product(right)
        return self.magnitude(name).scale(left, right, product, self.scaling[name])

    def delta_matrix(self, adapter_name: str) -> Tensor:
        delta = super().delta_matrix(adapter_name)
        if adapter_name not in self.lora_magnitude_vector:
            return delta
        weight = self.base.matrix().float()
        return self._scale(adapter_name)[:, None] * (weight + delta) - weight

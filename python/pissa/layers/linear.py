"""The adapted linear layer: nn.Linear, transformers' Conv1D, bitsandbytes' 4-bit and 8-bit layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes import Nf4Base, is_bitsandbytes
from pissa.base.stored import StoredLinear
from pissa.base.weights import base_product, bias_of
from pissa.layers.layer import PissaLayer


class PissaLinear(PissaLayer, LoraLinear):  # type: ignore[misc]
    """A PissaLayer over a linear module: lora_A[adapter].weight is dA [r, in], lora_B[adapter].weight dB [out, r];
    with DoRA lora_magnitude_vector[adapter] is a Magnitude."""

    @property
    def is_quantised(self) -> bool:
        """Whether bitsandbytes' codes are the base."""
        base = self.unmerged_base
        return isinstance(base, Nf4Base) or is_bitsandbytes(base, "Linear8bitLt")

    def factor_parameters(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        if len(names) == 1 and not self._drops_out(names[0]):
            weight, implicit = self._packed_weight(names[0], x.dtype)
            if weight is not None:
                return self._scaled(self._fused(x, weight, implicit, names[0]), names[0])
        if not any(name in self.lora_magnitude_vector for name in names):
            return super().adapted(x, names)
        # As PEFT composes them: each magnitude scales the base with its own adapter's change, not the others'.
        base = y = cast(Tensor, self.base_layer(x))
        for name in names:
            alone = self._scaled(self.change(base, x, name), name)
            y = alone if y is base else y + (alone - base)
        return y

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        (da, db), start = self.changed_factors(adapter_name), self.start_of(adapter_name)
        x = self.lora_dropout[adapter_name](x)
        return ops.add_low_rank(y, x, da, db, a0=start.a0, b0=start.b0, scaling=self.scaling[adapter_name])

    # -- one product with a packed weight and the factors

    def _packed_weight(self, name: str, dtype: torch.dtype) -> tuple[Tensor | ops.QuantizedWeight | None, bool]:
        """The weight for `_fused`, None where the adapter is not part of one product; and whether it is whole, in 4
        bits, so that the change comes on top: else it lacks just what the adapter starts from."""
        base = self.base_layer
        if isinstance(base, Nf4Base) and base.compute_dtype in (None, dtype):
            return base.nf4, True
        if (
            isinstance(base, StoredLinear)
            and self.start_of(name) is base.start
            and self.scaling[name] == base.scaling  # PEFT's set_scale may have changed it
        ):
            return base.residual, False
        return None, False

    def _fused(self, x: Tensor, weight: Tensor | ops.QuantizedWeight, implicit: bool, name: str) -> Tensor:
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
        bias = bias_of(self.base_layer)
        linear = y if bias is None else y - bias
        return y + ((self._scale(name) - 1) * linear).to(y.dtype)

    def _scale(self, name: str) -> Tensor:
        with torch.no_grad():
            right, left = self.start_of(name).factors_of_change(self.deltas(name))
            product = base_product(self.unmerged_base, right)
        return self.magnitude(name).scale(left, right, product, self.scaling[name])

    def delta_matrix(self, adapter_name: str) -> Tensor:
        delta = super().delta_matrix(adapter_name)
        if adapter_name not in self.lora_magnitude_vector:
            return delta
        weight = self.dense_base().float()
        return self._scale(adapter_name)[:, None] * (weight + delta) - weight

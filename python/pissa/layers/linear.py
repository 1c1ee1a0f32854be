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
            weight, residual = self._packed_weight(names[0], x.dtype)
            if weight is not None:
                return self._scaled(self._fused(x, weight, residual, names[0]), names[0])
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

    def _packed_weight(self, name: str, dtype: torch.dtype) -> tuple[Tensor | ops.Nf4Weight | None, str]:
        """The weight for `_fused`, None where the adapter is not part of one product, and its `residual`: it lacks just
        what the adapter starts from ("stored"), or all of it is in 4 bits and the change comes on top ("implicit")."""
        base = self.base_layer
        if isinstance(base, Nf4Base) and base.compute_dtype in (None, dtype):
            return base.nf4, "implicit"
        if (
            isinstance(base, StoredLinear)
            and self.start_of(name) is base.start
            and self.scaling[name] == base.scaling  # PEFT's set_scale may have changed it
        ):
            return base.residual, "stored"
        return None, ""

    def _fused(self, x: Tensor, weight: Tensor | ops.Nf4Weight, residual: str, name: str) -> Tensor:
        (da, db), start = self.changed_factors(name), self.start_of(name)
        return ops.linear(
            x,
            weight,
            self.base_layer.bias,
            delta_a=da,
            delta_b=db,
            a0=start.a0,
            b0=start.b0,
            scaling=self.scaling[name],
            residual=residual,
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

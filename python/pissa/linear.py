"""The adapted linear layer: nn.Linear, transformers' Conv1D, bitsandbytes' 4-bit and 8-bit layers."""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from pissa import ops
from pissa.layer import PissaLayer
from pissa.nf4 import Nf4Base
from pissa.stored import StoredLinear


class PissaLinear(PissaLayer, LoraLinear):  # type: ignore[misc]
    """A PissaLayer over a linear module: lora_A[adapter].weight is dA [r, in], lora_B[adapter].weight dB [out, r]."""

    def deltas(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base = self.base_layer
        if len(names) == 1 and not self._drops_out(names[0]):
            (name,) = names
            start = self.start_of(name)
            # One product of the packed weight and the factors: the residual lacks just what the adapter starts from,
            # or the whole weight is in 4 bits and the change comes on top.
            if isinstance(base, StoredLinear) and start is base.start and self.scaling[name] == base.scaling:
                return self._fused(x, base.residual, name)
            if isinstance(base, Nf4Base):
                return self._fused(x, base.nf4, name, residual="implicit")
        return super().adapted(x, names)

    def _fused(self, x: Tensor, weight: Tensor | ops.Nf4Weight, name: str, residual: str = "stored") -> Tensor:
        (da, db), start = self.deltas(name), self.start_of(name)
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

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        (da, db), start = self.deltas(adapter_name), self.start_of(adapter_name)
        x = self.lora_dropout[adapter_name](x)
        return ops.add_low_rank(y, x, da, db, a0=start.a0, b0=start.b0, scaling=self.scaling[adapter_name])

    def _drops_out(self, adapter_name: str) -> bool:
        dropout = self.lora_dropout[adapter_name]
        return isinstance(dropout, nn.Dropout) and dropout.training

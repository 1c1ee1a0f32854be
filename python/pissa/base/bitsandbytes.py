"""bitsandbytes' layers as bases. A 4-bit layer is replaced by ours with the same bytes; an 8-bit one stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes_state import as_bytes, nf4_from_state
from pissa.base.bitsandbytes_state import from_state as from_state
from pissa.base.bitsandbytes_state import to_bitsandbytes as to_bitsandbytes
from pissa.base.protocol import Operand
from pissa.base.start import StartFactors
from pissa.base.weights import CodedLinear, Dense, dense_linear, in_memory
from pissa.distributed import is_sharded


def is_bitsandbytes(module: nn.Module, *names: str) -> bool:
    """Whether `module` is one of bitsandbytes' classes with these names. Does not import bitsandbytes."""
    return type(module).__name__ in names and type(module).__module__.startswith("bitsandbytes.")


class BnbLinear4bit(CodedLinear):
    """The base that replaces bitsandbytes' Linear4bit, y = x Qᵀ + b. It computes the same from the same bytes, on the
    CPU also in evaluation (where bitsandbytes repacks them and loses the gradient). It stores three dtypes:
    `quant_storage`, of the parameter that holds the codes; the one that bitsandbytes decodes them to; and the one that
    it casts inputs to, or None."""

    fingerprint_dtype = None

    def __init__(
        self,
        weight: ops.QuantizedWeight,
        bias: nn.Parameter | None,
        *,
        quant_storage: torch.dtype,
        decoded_dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(weight, bias, quant_storage)
        self.decoded_dtype, self.compute_dtype = decoded_dtype, compute_dtype

    def operand_for(self, start: StartFactors, scaling: float, x: Tensor) -> Operand | None:
        """The codes, for an input that bitsandbytes' layer would not cast."""
        return super().operand_for(start, scaling, x) if self.compute_dtype in (None, x.dtype) else None

    def restore_module(self) -> nn.Module:
        """Returns bitsandbytes' layer over the same bytes."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        linear: Any = Linear4bit(
            self.in_features,
            self.out_features,
            bias=False,
            compute_dtype=self.compute_dtype,
            compress_statistics=self.double_quant,
            quant_type="nf4",
            quant_storage=self.quant_storage,
            device="meta",
        )
        entries = to_bitsandbytes(self.quantized, self.decoded_dtype)
        state = {name.removeprefix("weight."): part for name, part in entries.items() if name != "weight"}
        codes = self.weight.data.reshape(-1, 1)
        weight = Params4bit.from_prequantized(codes, state, device=self.weight.device, module=linear)
        weight.quant_state.offset = self.offset  # bitsandbytes creates it in torch's default dtype
        linear._parameters = {"weight": weight, "bias": self.bias}
        return cast(nn.Module, linear.train(self.training))

    def forward(self, x: Tensor) -> Tensor:
        """The output, computed in `compute_dtype` if bitsandbytes' layer has one, and returned in the dtype of x."""
        if self.compute_dtype in (None, x.dtype):
            return super().forward(x)
        return ops.linear(x.to(self.compute_dtype), self.quantized, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, double_quant={self.double_quant}"


class BnbLinear(Dense):
    """A base that is a layer of bitsandbytes and computes with its codes. Only 8-bit codes are read here: an adapted
    4-bit layer is replaced by a BnbLinear4bit."""

    is_quantised = True
    dense_type: type[nn.Module] = nn.Linear
    dtype: torch.dtype | None = None

    def _dense_module(self, matrix: Tensor) -> nn.Module:
        return dense_linear(nn.Linear, matrix, self.bias, self.module.training)

    def matrix(self) -> Tensor:
        """The weight in float32. The layer keeps its scales in its weight until it is called, then in its state."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        with in_memory(self.module):
            scales = self.module.weight.SCB if self.module.state.SCB is None else self.module.state.SCB
            return cast(Tensor, int8_vectorwise_dequant(self.module.weight.detach(), scales))


def why_unusable(linear: Any) -> str | None:
    """Why the codes of a layer of bitsandbytes, `Linear4bit` or `Linear8bitLt`, cannot be used; None if they can."""
    weight, is_int8 = linear.weight, is_bitsandbytes(linear, "Linear8bitLt")
    if is_sharded(weight):
        return "its codes are sharded, apart from their scales: wrap the model first and shard it then"
    if is_int8 and linear.state.has_fp16_weights:
        return "it keeps its weight in 16 bits (has_fp16_weights=True): use nn.Linear, or quantise the weight"
    state = getattr(weight, "quant_state", None)
    if not (weight.dtype == torch.int8 if is_int8 else state):
        return "its weight is not quantised yet: move the model to its device first, model.to('cpu')"
    if state is not None and state.quant_type != "nf4":
        return f"its weight is quantised as {state.quant_type}; load the model with bnb_4bit_quant_type='nf4'"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked its weight for evaluation: load the model anew, or wrap it before"
    return None


def from_bitsandbytes(linear: Any) -> BnbLinear4bit:
    """A layer with the bytes of bitsandbytes' `Linear4bit`, which is not changed."""
    state = linear.weight.quant_state
    nested_absmax, offset = (state.state2.absmax, state.offset.reshape(())) if state.nested else (None, None)
    codes, shape = as_bytes(linear.weight.data), (state.shape[0], state.shape[1])
    weight = ops.QuantizedWeight(codes, state.absmax, nested_absmax, offset, "nf4", shape, state.blocksize)
    base = BnbLinear4bit(
        weight,
        linear.bias,
        quant_storage=linear.weight.dtype,
        decoded_dtype=state.dtype,
        compute_dtype=linear.compute_dtype,
    )
    base.training = linear.training
    return base


def linear4bit(
    entries: Mapping[str, Tensor], bias: nn.Parameter | None, compute_dtype: torch.dtype | None
) -> BnbLinear4bit:
    """The layer for the state dict entries of a weight, as `from_state` takes them. Does not need bitsandbytes."""
    weight, decoded_dtype = nf4_from_state(entries)
    storage = entries["weight"].dtype
    return BnbLinear4bit(weight, bias, quant_storage=storage, decoded_dtype=decoded_dtype, compute_dtype=compute_dtype)

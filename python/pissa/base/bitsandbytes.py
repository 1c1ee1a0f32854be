"""bitsandbytes' layers as bases: a 4-bit one's bytes are ours, an 8-bit one stays what it is. And weights out of
the state dicts of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes_state import ROWS, STATE
from pissa.base.bitsandbytes_state import to_bitsandbytes as to_bitsandbytes
from pissa.base.codes import HoldsCodes
from pissa.base.digest import Fingerprint
from pissa.base.nf4_state import Nf4State, parse
from pissa.base.start import StartFactors
from pissa.base.weights import Dense, OwnBase, copy_without_hooks, dense_linear
from pissa.config import IMPLICIT
from pissa.ops.formats import FORMATS


def is_bitsandbytes(module: nn.Module, name: str) -> bool:
    """Whether `module` is bitsandbytes' class of that name, asked without importing bitsandbytes."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.startswith("bitsandbytes.")


class BnbLinear4bit(HoldsCodes, OwnBase):
    """The base in the place of bitsandbytes' Linear4bit, y = x Qᵀ + b: it computes the same from the same bytes, on the
    CPU in training as in evaluation (bitsandbytes there repacks them and loses the gradient)."""

    form = IMPLICIT
    start: StartFactors | None = None
    residual: Tensor | ops.QuantizedWeight | None = None
    fingerprint: Fingerprint | None = None
    is_bnb_quantised = True

    def __init__(
        self,
        weight: ops.QuantizedWeight,
        bias: nn.Parameter | None,
        *,
        quant_storage: torch.dtype,
        decoded_dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
        linear: Any = None,
    ) -> None:
        """
        Args:
            quant_storage: the dtype of the parameter that holds the codes.
            decoded_dtype: what bitsandbytes decodes the weight to.
            compute_dtype: what it casts inputs to; None for their own.
            linear: its layer, if there is one. `restored` makes one otherwise.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.hold(weight, quant_storage)
        self.bias = bias
        self.decoded_dtype, self.compute_dtype = decoded_dtype, compute_dtype
        # The layer without its tensors, which would not follow ours to a device. A list keeps it out of our modules.
        self._rest = [] if linear is None else [_without_tensors(linear)]

    def matrix(self) -> Tensor:
        """The weight in float32 [out, in]."""
        return ops.dequantize(self.quantized)

    def product(self, x: Tensor) -> Tensor:
        """The output without the bias."""
        return ops.linear(x, self.quantized)

    def fused(
        self, start: StartFactors, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor | ops.QuantizedWeight, bool] | None:
        """The codes, which are the whole weight, for an input that bitsandbytes' layer would not cast."""
        return (self.quantized, True) if self.compute_dtype in (None, dtype) else None

    def shown_weight(self, dtype: torch.dtype) -> Tensor:
        return self.matrix().to(dtype)

    def restored(self) -> nn.Module:
        """bitsandbytes' layer again, over the same bytes."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        if self._rest:
            linear = copy.copy(self._rest[0])
        else:
            linear = Linear4bit(
                self.in_features,
                self.out_features,
                bias=False,
                compute_dtype=self.compute_dtype,
                compress_statistics=self.double_quant,
                quant_type="nf4",
                quant_storage=self.quant_storage,
                device="meta",
            )
        state = _quant_state(self.quantized, self.decoded_dtype)
        weight = Params4bit(
            self.weight.data.reshape(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.double_quant,
            quant_type="nf4",
            quant_storage=self.quant_storage,
            module=linear,
            bnb_quantized=True,
        )
        linear._parameters = {"weight": weight, "bias": self.bias}
        linear.quant_state = state
        return cast(nn.Module, linear.train(self.training))

    def forward(self, x: Tensor) -> Tensor:
        """The output, computed in `compute_dtype` if bitsandbytes' layer has one, and in the dtype of x again."""
        if self.compute_dtype in (None, x.dtype):
            return ops.linear(x, self.quantized, self.bias)
        return ops.linear(x.to(self.compute_dtype), self.quantized, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={self.double_quant}"


class BnbLinear(Dense):
    """The base that a layer of bitsandbytes is: its weight is codes, which bitsandbytes computes with."""

    is_bnb_quantised = True

    @property
    def dense_type(self) -> type[nn.Module]:
        return nn.Linear

    @property
    def dtype(self) -> torch.dtype | None:
        return None

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _twin(self, matrix: Tensor) -> nn.Module:
        return dense_linear(nn.Linear, matrix, self.bias, self.module.training)


class BnbLinear8bit(BnbLinear):
    """The base that bitsandbytes' Linear8bitLt is."""

    @property
    def matrix_is_copy(self) -> bool:
        return True

    def _matrix(self) -> Tensor:
        """The weight in float32. The layer keeps its scales in its weight until it is called, then in its state."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = self.module.weight.SCB if self.module.state.SCB is None else self.module.state.SCB
        return cast(Tensor, int8_vectorwise_dequant(self.module.weight.detach(), scales))


def from_bitsandbytes(linear: Any) -> BnbLinear4bit:
    """The layer with the bytes of bitsandbytes' `Linear4bit`, which is not changed.

    Raises:
        TypeError: another type of quantisation than nf4, or a layer whose weight is not quantised yet.
    """
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        raise TypeError("its weight is not quantised yet: move the model to its device first, model.to('cpu')")
    if state.quant_type != "nf4":
        raise TypeError(f"its weight is quantised as {state.quant_type}; load the model with bnb_4bit_quant_type='nf4'")
    if getattr(state, "packing_format_for_cpu", False):
        raise TypeError("bitsandbytes has repacked its weight for evaluation: load the model anew, or wrap it before")
    nested = state.state2 if state.nested else None
    weight = ops.QuantizedWeight(
        _bytes(linear.weight.data),
        state.absmax,
        None if nested is None else nested.absmax,
        None if nested is None else state.offset.reshape(()),
        "nf4",
        (state.shape[0], state.shape[1]),
        state.blocksize,
    )
    base = BnbLinear4bit(
        weight,
        linear.bias,
        quant_storage=linear.weight.dtype,
        decoded_dtype=state.dtype,
        compute_dtype=linear.compute_dtype,
        linear=linear,
    )
    base.training = linear.training
    return base


def linear4bit(
    entries: Mapping[str, Tensor], bias: nn.Parameter | None, compute_dtype: torch.dtype | None
) -> BnbLinear4bit:
    """The layer whose state dict has these entries of its weight, as `from_state` takes them. Needs no bitsandbytes.

    Raises:
        ValueError: as `from_state`.
    """
    weight, state = _nf4_from_state(entries)
    return BnbLinear4bit(
        weight,
        bias,
        quant_storage=entries["weight"].dtype,
        decoded_dtype=state.dtype,
        compute_dtype=compute_dtype,
    )


def _bytes(packed: Tensor) -> Tensor:
    """The codes in a tensor of any dtype (bitsandbytes' `quant_storage`), as bytes."""
    return packed.reshape(-1).view(torch.uint8)


def _without_tensors(linear: Any) -> Any:
    rest = copy_without_hooks(linear)
    rest._parameters = {}
    rest.quant_state = None
    return rest


def check_int8(linear: Any) -> None:
    """Raises TypeError if bitsandbytes' `Linear8bitLt` holds no weight in 8 bits."""
    if linear.state.has_fp16_weights:
        raise TypeError("it keeps its weight in 16 bits (has_fp16_weights=True): use nn.Linear, or quantise the weight")
    if linear.weight.dtype != torch.int8:
        raise TypeError("its weight is not quantised yet: move the model to its device first, model.to('cpu')")


def from_state(entries: Mapping[str, Tensor]) -> ops.QuantizedWeight:
    """The way back from `to_bitsandbytes`, without copying bytes.

    Args:
        entries: of one layer in bitsandbytes' state dict, by their names in it ("weight", "weight.absmax", ... of
            `Linear4bit`; "weight", "SCB", ... of `Linear8bitLt`). "bias" is not read.

    Raises:
        ValueError: an entry is missing, or they describe a matrix in neither format.
    """
    if "SCB" in entries or ("weight" in entries and entries["weight"].dtype == torch.int8):
        return _int8_from_state(entries)
    return _nf4_from_state(entries)[0]


def _int8_from_state(entries: Mapping[str, Tensor]) -> ops.QuantizedWeight:
    if not {"weight", "SCB"} <= entries.keys():
        raise ValueError(
            f"no 8-bit weight of bitsandbytes: got the entries {sorted(entries)}; needed: weight and its scales SCB"
        )
    codes, scales = entries["weight"], entries["SCB"]
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"weight: got {codes.dtype} {list(codes.shape)}; needed: torch.int8 [out, in]")
    if scales.dtype != torch.float32 or scales.numel() != len(codes):
        raise ValueError(f"SCB: got {scales.dtype} {list(scales.shape)}; needed: torch.float32 [{len(codes)}]")
    # As bitsandbytes reads it: what is missing is rows.
    if (order := entries.get("weight_format")) is not None and order.flatten().tolist() != [ROWS]:
        raise ValueError(f"weight_format: got {order.tolist()}; allowed: {ROWS}, for codes row by row")
    shape = (codes.shape[0], codes.shape[1])
    packed = codes.contiguous().view(torch.uint8).reshape(-1)
    return ops.QuantizedWeight(packed, scales.reshape(-1), None, None, "int8", shape, shape[1])


def _nf4_from_state(entries: Mapping[str, Tensor]) -> tuple[ops.QuantizedWeight, Nf4State]:
    """The weight, and what the entries say of it beside tensors."""
    kinds = [name.removeprefix(STATE) for name in entries if name.startswith(STATE)]
    if kinds not in ([], ["nf4"]):
        raise ValueError(f"weight: quantised as {', '.join(kinds)}; allowed: nf4")
    state = parse(entries[f"{STATE}nf4"]) if kinds else None
    nested = state is not None and state.offset is not None
    needed = {"weight", "weight.absmax", "weight.quant_map"}
    needed |= {"weight.nested_absmax", "weight.nested_quant_map"} if nested else set()
    if state is None or not needed <= entries.keys():
        raise ValueError(
            f"no 4-bit weight of bitsandbytes: got the entries {sorted(entries)}; needed: weight, and of it absmax, "
            "quant_map, quant_state.bitsandbytes__nf4; with double quantisation also nested_absmax, nested_quant_map"
        )
    absmax = entries["weight.absmax"]
    weight = ops.QuantizedWeight(
        _bytes(entries["weight"]),
        absmax,
        entries["weight.nested_absmax"] if nested else None,
        torch.tensor(state.offset, dtype=torch.float32, device=absmax.device) if nested else None,
        "nf4",
        state.shape,
        state.blocksize,
    )
    if (weight.absmax.dtype == torch.uint8) != nested or ("weight.nested_absmax" in entries) != nested:
        raise ValueError("weight.nested_absmax: needed just where weight.absmax is quantised, in uint8")
    _check_parts(weight)
    return weight, state


def _check_parts(weight: ops.QuantizedWeight) -> None:
    format = FORMATS[weight.format]
    format.check_options(weight.blocksize, weight.nested)
    for name, (shape, dtype) in format.tensors(weight.shape, weight.blocksize, weight.nested).items():
        part = weight.tensors()[name]
        if (part.numel(), part.dtype) != (math.prod(shape), dtype):
            raise ValueError(
                f"weight: {name} of a matrix {list(weight.shape)} in blocks of {weight.blocksize}: got {part.dtype} "
                f"{list(part.shape)}; needed: {dtype} {list(shape)}"
            )


def _quant_state(weight: ops.QuantizedWeight, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    nested = None
    if weight.nested_absmax is not None:
        nested_code = create_dynamic_map().to(weight.device)
        nested = QuantState(absmax=weight.nested_absmax, code=nested_code, blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        dtype=dtype,
        blocksize=weight.blocksize,
        code=get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=weight.offset,
        state2=nested,
    )

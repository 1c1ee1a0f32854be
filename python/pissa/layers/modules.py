"""The adapted layer for each kind of module: nn.Linear, transformers' Conv1D and bitsandbytes' layers; embeddings,
which are the linear layer W = weightᵀ [dim, vocabulary] of one-hot vectors; and convolutions, where W [out, in *
kernel] is the flattened weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import Conv1d as LoraConv1d
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Conv3d as LoraConv3d
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  everybody's name for it
from transformers.pytorch_utils import Conv1D

from pissa import ops
from pissa.base.digest import seed_of, xxh3
from pissa.base.weights import has_hooks
from pissa.layers.layer import PissaLayer
from pissa.ops._grouped import group_key
from pissa.ops._merge import unchecked_merge


class GroupMember(NamedTuple):
    """What `ops.grouped_linear` takes of one layer."""

    weight: ops.QuantizedWeight
    scaling: float
    int8: bool
    a: Tensor
    b: Tensor
    a0: Tensor | None = None
    b0: Tensor | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What the layers of a group have in common."""
        return *group_key(self.weight), len(self.a), self.a0 is None, self.scaling, self.int8


def _is_watched(module: nn.Module) -> bool:
    return "forward" in vars(module) or has_hooks(module)


class PissaLinear(PissaLayer, LoraLinear):  # type: ignore[misc]
    """A PissaLayer over a linear module. lora_A[adapter].weight is dA [r, in] and lora_B[adapter].weight is dB [out,
    r]. With DoRA, lora_magnitude_vector[adapter] is a Magnitude."""

    def _is_rounded(self, adapter_name: str) -> bool:
        return adapter_name in self.merge_aware and self.base.is_quantised

    _merged: tuple[tuple[str, ...], ops.QuantizedWeight] | None = None

    def merged_codes(self, adapter_name: str) -> ops.QuantizedWeight:
        """The base's codes with the adapter's change, as a merge into codes writes them. They are kept until the change
        is another."""
        deltas, start = self.deltas(adapter_name), self.start_of(adapter_name)
        a, b = (factor.detach() for factor in start.factors_of_change(deltas))
        scaling = self.scaling[adapter_name]
        known = adapter_name, str(scaling), xxh3(a, b)
        if self._merged is None or self._merged[0] != known:
            held, seed = cast(Any, self.base).quantized, seed_of(self._target_name)
            with torch.inference_mode(False):  # an evaluation in that mode would leave what no training step takes
                self._merged = known, unchecked_merge(held, a, b, scaling, True, seed)[0]
        return self._merged[1]

    def compute_adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        if len(names) == 1 and self._is_rounded(names[0]):
            (da, db), start = self.deltas(names[0]), self.start_of(names[0])
            a, b, codes = start.a0 + da, start.b0 + db, self.merged_codes(names[0])
            return ops.linear_through(x, codes, self.base_layer.bias, a, b, self.scaling[names[0]])
        if len(names) == 1 and not self._drops_out(names[0]):
            name, start, scaling = names[0], self.start_of(names[0]), self.scaling[names[0]]
            operand = self.base.operand_for(start, scaling, x)
            if operand is not None:
                da, db = self.deltas(name)
                factors = {"a": da, "b": db, "a0": start.a0, "b0": start.b0, "scaling": scaling}
                int8 = self.int8 and self.training
                y = ops.linear(x, operand.weight, self.base_layer.bias, **factors, implicit=operand.implicit, int8=int8)
                return self._rescale(y, name)
        if not any(name in self.lora_magnitude_vector for name in names):
            return super().compute_adapted(x, names)
        # Composed as in PEFT: each magnitude scales the base with its own adapter's change, not with the others'.
        base = y = cast(Tensor, self.base_layer(x))
        for name in names:
            alone = self.change(base, x, name)
            y = alone if y is base else y + (alone - base)
        return y

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        if self._is_rounded(adapter_name):
            alone: Tensor = self.base_layer(x)
            return y + (self.compute_adapted(x, [adapter_name]) - alone)
        (da, db), start = self.deltas(adapter_name), self.start_of(adapter_name)
        x = self.lora_dropout[adapter_name](x)
        y = ops.add_low_rank(y, x, da, db, a0=start.a0, b0=start.b0, scaling=self.scaling[adapter_name])
        return self._rescale(y, adapter_name)

    def as_group_member(self, x: Tensor) -> GroupMember | None:
        """The layer as one of a group, for inputs like `x`. None if it computes anything but one product of codes and
        of one adapter's factors, or of the base alone, or if hooks are called with it. Codes that are the whole weight
        take a LoRA: its B starts at 0, so that its factors are the change."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.r]
        base = self.base
        if (self.merged and not self.disable_adapters) or _is_watched(self) or any(map(self._is_rounded, names)):
            return None
        if base.start is None and {self.start_of(name).origin.init for name in names or self.r} != {"lora"}:
            return None
        if names:
            if len(names) > 1 or self._drops_out(names[0]) or names[0] in self.lora_magnitude_vector:
                return None
            start, scaling = self.start_of(names[0]), self.scaling[names[0]]
            factors: tuple[Tensor, ...] = (*self.deltas(names[0]), start.a0, start.b0)
        else:
            if _is_watched(base.module):
                return None
            start = base.start or self.start_of(next(iter(self.r)))
            scaling, factors = start.origin.scaling, (start.a0, start.b0)
        operand = base.operand_for(start, scaling, x)
        if operand is None or isinstance(operand.weight, Tensor) or base.bias is not None:
            return None
        return GroupMember(operand.weight, scaling, self.int8 and self.training, *factors)

    def _drops_out(self, adapter_name: str) -> bool:
        dropout = self.lora_dropout[adapter_name]
        return isinstance(dropout, nn.Dropout) and dropout.training

    def _rescale(self, y: Tensor, name: str) -> Tensor:
        """Returns `y`, the output of the base and only this adapter, scaled by DoRA. Where the scale is 1, it has y's
        bits."""
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
        if self._is_rounded(adapter_name):
            return ops.dequantize(self.merged_codes(adapter_name)) - self.base.matrix()
        delta = super().delta_matrix(adapter_name)
        if adapter_name not in self.lora_magnitude_vector:
            return delta
        weight = self.base.matrix().float()
        return self._scale(adapter_name)[:, None] * (weight + delta) - weight


class PissaEmbedding(PissaLayer, LoraEmbedding):  # type: ignore[misc]
    """A PissaLayer over nn.Embedding: lora_embedding_A[adapter] is dA [r, vocabulary], lora_embedding_B[adapter] is dB
    [dim, r]. A product with A looks up its columns."""

    factor_keys = ("lora_embedding_A", "lora_embedding_B")

    def factor_parameters(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        (da, db), start = self.deltas(adapter_name), self.start_of(adapter_name)
        rows_of_a = F.embedding(x, da.mT, padding_idx=self.base_layer.padding_idx).float()  # no gradient for that row
        change = (F.embedding(x, start.a0.mT) + rows_of_a) @ db.float().mT + rows_of_a @ start.b0.mT
        # Gemma's and BART's embeddings multiply the rows that they look up by a scale.
        scale: float | Tensor = self.scaling[adapter_name] * getattr(self.base_layer, "embed_scale", 1.0)
        return y + (scale * change).to(y.dtype)


class PissaConvolution(PissaLayer):
    """A PissaLayer over a convolution without groups. lora_A[adapter] is a convolution like the base's to r channels,
    with weight dA [r, in, *kernel]. lora_B[adapter] is a pointwise convolution with weight dB [out, r, 1, ...]."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        weight = self.base_layer.weight
        return weight.shape[0], weight[0].numel()

    def as_parameters(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kernel = self.base_layer.weight.shape[1:]
        return a.reshape(-1, *kernel), b.reshape(*b.shape, *(1 for _ in kernel[1:]))

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1), b.flatten(1)

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        (da, db), start = (delta.float() for delta in self.deltas(adapter_name)), self.start_of(adapter_name)
        x = self.lora_dropout[adapter_name](x).float()
        base, point = self.base_layer, self.lora_B[adapter_name]
        of_da = _filter(base, x, da)
        change = _filter(point, _filter(base, x, start.a0) + of_da, db) + _filter(point, of_da, start.b0)
        scaling: float = self.scaling[adapter_name]
        return y + (scaling * change).to(y.dtype)


def _filter(convolution: Any, x: Tensor, filters: Tensor) -> Tensor:
    """Returns the output of the convolution with the rows of `filters` instead of its own, and without a bias."""
    filters = filters.reshape(-1, *convolution.weight.shape[1:])
    return cast(Tensor, convolution._conv_forward(x, filters, None))


class PissaConv1d(PissaConvolution, LoraConv1d):  # type: ignore[misc]
    """Over nn.Conv1d."""


class PissaConv2d(PissaConvolution, LoraConv2d):  # type: ignore[misc]
    """Over nn.Conv2d."""


class PissaConv3d(PissaConvolution, LoraConv3d):  # type: ignore[misc]
    """Over nn.Conv3d."""


LAYER_CLASSES: dict[type[nn.Module] | None, type[PissaLayer]] = {
    nn.Linear: PissaLinear,
    Conv1D: PissaLinear,
    nn.Embedding: PissaEmbedding,
    nn.Conv1d: PissaConv1d,
    nn.Conv2d: PissaConv2d,
    nn.Conv3d: PissaConv3d,
}
"""The layer classes by `Base.module_class`."""

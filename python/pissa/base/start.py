"""The start of an adapter: the frozen factors A0 and B0, and the trained differences from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pissa.ops.low_rank import join_difference


class KeepsDtype(nn.Module):
    """A module whose buffers follow it to another device but never to another dtype.

    Start factors and quantisation scales define the base function; `model.half()` must not round them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Origin(NamedTuple):
    """What determines start factors, given the base. Adapters of a layer with the same origin share them."""

    r: int
    scaling: float
    init: str
    """The name of the init method."""
    identity: tuple[tuple[str, Any], ...]
    """Other fields of the configuration that the method depends on: names and values; see `InitMethod.identity`."""

    @property
    def error_feedback(self) -> bool:
        """Whether a residual that lacks this start has codes that its weight does not determine by itself."""
        return ("error_feedback", True) in self.identity


class Deltas(NamedTuple):
    """The trained differences dA and dB from the start factors."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""


class StartFactors(KeepsDtype):
    """The frozen factors from which an adapter starts: a0 float32 [r, in], b0 float32 [out, r]. scaling * b0 @ a0 is
    the principal part, or what replaces it; LoRA's b0 is zero.

    Args:
        recipe: how a weight is stored for this start: the factors a [k, in] and b [out, k], float32, of Q = format(W -
            scaling * b @ a). k may be 0. None: a0 and b0 themselves. Only a residual that is made again needs it.
            Therefore it is not a part of the state dict, and does not follow the module to another device: once the
            residual is stored, a recipe of rank 1 or more is on the CPU.
    """

    a0: Tensor
    b0: Tensor

    def __init__(self, a0: Tensor, b0: Tensor, origin: Origin, recipe: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.register_buffer("a0", a0.contiguous())
        self.register_buffer("b0", b0.contiguous())
        self.origin, self.recipe = origin, recipe

    @property
    def removed(self) -> tuple[Tensor, Tensor]:
        """The factors that are taken out of a weight stored for this start."""
        return self.recipe or (self.a0, self.b0)

    @property
    def recipe_rank(self) -> int | None:
        """The rank of the recipe's factors; None if they are a0 and b0."""
        return None if self.recipe is None else len(self.recipe[0])

    @property
    def known_by(self) -> list[Tensor]:
        """The tensors whose fingerprint a record contains: the factors, and those of the recipe, if it has any."""
        return [self.a0, self.b0, *(self.recipe if self.recipe and self.recipe_rank else ())]

    @property
    def changes_nothing(self) -> bool:
        """Whether B0 A0 is zero because B0 is, as for LoRA's start: then B A is the whole change."""
        return not self.b0.any()

    def factors_of_change(self, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """[A ; dA] [2r, in] and [dB | B0] [out, 2r], float32. Their product is B A - B0 A0, without cancellation."""
        da, db = (delta.float() for delta in deltas)
        return join_difference(self.a0 + da, da, db, self.b0)

    def extra_repr(self) -> str:
        return f"in={self.a0.shape[1]}, r={self.a0.shape[0]}, out={self.b0.shape[0]}"


ServedBase = Literal["original", "residual"]
"""The weight to which a plain LoRA is added: the unmodified one, or what the layer stores of it."""


class Starts(NamedTuple):
    """An adapter's start in one layer, beside that of the layer's base; from a model or from a file. With what was
    trained, they make the factors of a plain LoRA."""

    own: StartFactors
    scaling: float
    """The adapter's scaling."""
    base: StartFactors | None
    """The start that the layer's stored base lacks; None if the base is the whole weight."""

    def factors_on(self, weight: ServedBase, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """The factors a [k, in] and b [out, k], float32, of the plain LoRA for that weight, with the adapter's
        scaling."""
        if self._keeps_own(weight):
            a, b = self.own.a0 + deltas.a, self.own.b0 + deltas.b
        else:
            a, b = self.own.factors_of_change(deltas)
        if (other := self.other_on(weight)) is None:
            return a, b
        ratio = other.origin.scaling / self.scaling
        return torch.cat([other.a0, a]), torch.cat([ratio * other.b0, b], dim=1)

    def rank_on(self, weight: ServedBase) -> int:
        """The rank k of these factors."""
        other, rank = self.other_on(weight), self.own.origin.r * (1 if self._keeps_own(weight) else 2)
        return rank if other is None else rank + other.origin.r

    def other_on(self, weight: ServedBase) -> StartFactors | None:
        """The start that the weight lacks and these factors have, if it is not the adapter's own."""
        if weight == "original" or self.base is None or self._base_lacks_own or self.base.changes_nothing:
            return None
        return self.base

    def _keeps_own(self, weight: ServedBase) -> bool:
        """Whether B A is the change: the weight lacks B0 A0, or B0 A0 is zero."""
        return (weight == "residual" and self._base_lacks_own) or self.own.changes_nothing

    @property
    def _base_lacks_own(self) -> bool:
        return self.base is self.own and self.own.origin.scaling == self.scaling

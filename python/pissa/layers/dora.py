"""DoRA (arXiv 2402.09353): each row of W + dW is scaled to a trained length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pissa.base.frozen import KeepsDtype
from pissa.distributed import sharded_as


class Magnitude(KeepsDtype):
    """The trained lengths m of a layer's rows. They start from the lengths of the base's rows: float32 [out].

        y = (m / ‖W + dW‖) (W + dW) x + b

    The lengths ‖W + dW‖ carry no gradient (section 4.3 there). For dW = s L R of low rank they follow from products
    with L and R: no dense matrix of W's size is formed. At the start m / ‖W + dW‖ is exactly 1.
    """

    base_lengths: Tensor

    def __init__(self, lengths: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lengths)
        self.register_buffer("base_lengths", lengths.detach().float().clone())

    @torch.no_grad()
    def set(self, lengths: Tensor, base_lengths: Tensor) -> None:
        """Takes these values, float32 [out]."""
        self.base_lengths.copy_(base_lengths)
        if self.weight.dtype != torch.float32:
            lengths = self._rounded_base(self.weight.dtype) + (lengths - base_lengths)
        self.weight.copy_(sharded_as(self.weight, lengths))

    def lengths(self, weight: Tensor) -> Tensor:
        """m, float32 [out], for the parameter `weight` in any dtype. A 16-bit parameter rounds its start; so m is the
        base's exact length plus the distance that the parameter has moved, and step 0 is the base."""
        if weight.dtype == torch.float32:
            return weight
        return self.base_lengths + (weight.float() - self._rounded_base(weight.dtype))

    def _rounded_base(self, dtype: torch.dtype) -> Tensor:
        return self.base_lengths.to(dtype).float()

    def scale(self, left: Tensor, right: Tensor, product: Tensor, scaling: float) -> Tensor:
        """m / ‖W + s L R‖ [out], differentiable in m.

        Args:
            left, right: L [out, k] and R [k, in], float32, detached.
            product: R Wᵀ [k, out], float32, detached.
            scaling: s.
        """
        # ‖w + s l R‖² = ‖w‖² + 2 s l (R wᵀ) + s² l (R Rᵀ) lᵀ for each row w of W and l of L
        grown = 2 * scaling * (left * product.mT).sum(1) + scaling**2 * ((left @ (right @ right.mT)) * left).sum(1)
        square = self.base_lengths.square()
        lengths = self.base_lengths * (1 + grown / square.where(square > 0, 1)).clamp(min=0).sqrt()
        lengths = lengths.where(square > 0, grown.clamp(min=0).sqrt())
        return (self.lengths(self.weight) / lengths.where(lengths > 0, 1)).where(lengths > 0, 1.0)

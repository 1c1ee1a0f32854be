"""What may be asked of a base, whatever it is, and how its weight is a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa import ops
from pissa.base.digest import Fingerprint
from pissa.base.start import StartFactors
from pissa.config import IMPLICIT, Form
from pissa.distributed import is_sharded, whole_device, whole_shape

_TRANSPOSED = (Conv1D, nn.Embedding)  # whose weight is [in, out]; an embedding is a linear layer of one-hot vectors
_FLATTENED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *_TRANSPOSED, *_FLATTENED)


def as_matrix(dense_type: type[nn.Module], weight: Tensor) -> Tensor:
    """The weight of a class of modules as a matrix [out, in]: a view."""
    return weight.mT if issubclass(dense_type, _TRANSPOSED) else weight.flatten(1)


def as_weight(dense_type: type[nn.Module], matrix: Tensor, shape: torch.Size) -> Tensor:
    """The matrix [out, in] as a weight of that class; `shape`: of a weight that is flattened."""
    if issubclass(dense_type, _TRANSPOSED):
        return matrix.mT
    return matrix.reshape(shape) if issubclass(dense_type, _FLATTENED) else matrix


class Base(ABC):
    """The frozen function of a layer, y = x Wᵀ + b on the weight W as a matrix [out, in]. `kinds.base_of` gives that
    of a module. What is answered here is so for a dense weight that is kept as it was given."""

    # Three without a value: nn.Module keeps them among its parameters and modules, which a value here would hide.
    module: Any
    """The module that computes the function."""
    bias: nn.Parameter | None
    """The bias, fetched if it is offloaded; None if there is none."""
    start: StartFactors | None
    """The start factors of a stored base; None if the whole weight is kept."""

    fingerprint: Fingerprint | None = None
    """Of the dense weight that a stored base has replaced; None if the whole weight is kept."""
    is_quantised: bool = False
    """Whether the whole weight is codes, bitsandbytes' or those that the model was released in."""
    fingerprint_dtype: torch.dtype | None = None
    """What the whole weight is rounded to before its fingerprint is computed; None: it stays as `matrix` gives it."""
    is_in_checkpoint: bool = False
    """Whether a checkpoint has the residual of a stored base."""

    @property
    def has_own_codes(self) -> bool:
        """Whether a stored base has codes that nothing else determines: neither the weight nor a checkpoint."""
        return self.start is not None and self.start.origin.error_feedback and not self.is_in_checkpoint

    @property
    def parameter(self) -> Tensor:
        """The module's parameter `weight`: the weight itself, a residual or codes."""
        return cast(Tensor, self.module.weight)

    @property
    def kind(self) -> type[nn.Module] | None:
        """What the function is: nn.Linear, Conv1D, nn.Embedding or a convolution; None if it is none of these."""
        return next((kind for kind in _KINDS if issubclass(self.dense_type, kind)), None)

    @property
    def dense_type(self) -> type[nn.Module]:
        """The class of a dense module in the base's place: `kind`, or a subclass of it."""
        return type(self.module)

    @property
    def form(self) -> Form:
        """How the weight is kept."""
        return IMPLICIT

    @property
    def residual(self) -> Tensor | ops.QuantizedWeight | None:
        """What a stored base keeps, as pissa.ops takes it; None if the whole weight is kept."""
        return None

    @property
    def bnb_codes(self) -> ops.QuantizedWeight | None:
        """The codes in 4 bits of bitsandbytes' that are the whole weight; None of any other base."""
        return None

    def original(self, weight: Tensor) -> Tensor | None:
        """A dense weight [out, in] as bitsandbytes has quantised it, in that dtype, on the codes' device; None if the
        base has no `bnb_codes`, or those of another weight."""
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of a dense weight; None if it is codes, which do not tell."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the module computes: where its weight is, or where accelerate or FSDP fetches it to."""
        return whole_device(self.parameter)

    @abstractmethod
    def matrix(self) -> Tensor:
        """The weight [out, in]: the module's own tensor or a view of it if that is dense, else decoded, float32. A
        dense weight that is sharded is gathered: all processes have to ask for it together."""

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ [k, out], float32 and without the bias, for x float32 [k, in]."""
        return ops.linear(x, self.matrix().detach())

    def fused(
        self, start: StartFactors, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor | ops.QuantizedWeight, bool] | None:
        """The weight that `ops.linear` takes together with an adapter of that start and scaling, for an input of
        `dtype`, and whether it is implicit, that is, the whole weight. None if the module computes its own product."""
        return None

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The matrix [out, in] in the shape of a dense weight of this kind."""
        return as_weight(self.dense_type, matrix, whole_shape(self.parameter))

    def shown_weight(self, dtype: torch.dtype) -> Tensor:
        """What others may take for the weight: the module's parameter; if that is a residual or our own codes, the
        decoded weight in `dtype`."""
        return self.parameter

    @abstractmethod
    def twin(self, matrix: Tensor) -> nn.Module:
        """A dense module in the base's place: the weight is `matrix` [out, in], frozen; all else, the bias too, is the
        base's own."""

    def restored(self) -> nn.Module:
        """The module that goes back into the model when the adapters are unloaded."""
        return cast(nn.Module, self.module)

    @abstractmethod
    def holding(self, weight: Tensor) -> Base:
        """A base like this one over another parameter `weight` of the same shape."""


def whole(base: Base, gathered: Tensor | None) -> Base:
    """Returns `base`, or, if its weight is sharded, a base like it that holds the full weight, `gathered`. Raises
    ValueError if nothing has been gathered then."""
    if not is_sharded(base.parameter):
        return base
    if gathered is None:
        raise ValueError(
            "a base weight was sharded before its fingerprint was known: call torch.distributed.init_process_group "
            "before pissa.wrap, or give save_pretrained a state_dict that has the frozen weights too"
        )
    return base.holding(gathered)

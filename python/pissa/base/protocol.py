"""The interface of every base, and how its weight is read as a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa import ops
from pissa.base.start import StartFactors
from pissa.config import IMPLICIT, Form
from pissa.distributed import is_sharded, whole_device, whole_shape

_TRANSPOSED = (Conv1D, nn.Embedding)  # their weight is [in, out]; an embedding is a linear layer of one-hot vectors
_FLATTENED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MODULE_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, *_TRANSPOSED, *_FLATTENED)


def as_matrix(dense_type: type[nn.Module], weight: Tensor) -> Tensor:
    """The weight of a class of modules as a matrix [out, in], which is a view."""
    return weight.mT if issubclass(dense_type, _TRANSPOSED) else weight.flatten(1)


def as_weight(dense_type: type[nn.Module], matrix: Tensor, shape: torch.Size) -> Tensor:
    """The matrix [out, in] as a weight of that class. `shape` is the shape of a weight that is flattened."""
    if issubclass(dense_type, _TRANSPOSED):
        return matrix.mT
    return matrix.reshape(shape) if issubclass(dense_type, _FLATTENED) else matrix


class Operand(NamedTuple):
    """What `ops.linear` multiplies by, beside an adapter's factors."""

    weight: Tensor | ops.QuantizedWeight
    implicit: bool
    """Whether it is the whole weight, from which the adapter's start is not missing."""


class Base(ABC):
    """The frozen function of a layer, y = x Wᵀ + b, with the weight W as a matrix [out, in]. `classes.base_of` returns
    the base of a module. The defaults here are those for a dense weight that is kept as it was given."""

    # Three have no value here: nn.Module keeps them among its parameters and modules, and a value here would hide them.
    module: Any
    """The module that computes the function."""
    bias: nn.Parameter | None
    """The bias, fetched if it is offloaded; None if there is none."""
    start: StartFactors | None
    """The start factors of a stored base; None if the whole weight is kept."""

    fingerprint: str | None = None
    """The fingerprint of the dense weight that a stored base has replaced; None if the whole weight is kept."""
    is_quantised: bool = False
    """Whether the whole weight is codes, bitsandbytes' or those in which the model was released."""
    fingerprint_dtype: torch.dtype | None = None
    """The dtype to which the whole weight is rounded for its fingerprint; None: as `matrix` returns it."""
    is_in_checkpoint: bool = False
    """Whether a checkpoint contains the residual of a stored base."""

    @property
    def has_own_codes(self) -> bool:
        """Whether a stored base has codes that neither the weight nor a checkpoint determines."""
        return self.start is not None and self.start.origin.error_feedback and not self.is_in_checkpoint

    @property
    def parameter(self) -> Tensor:
        """The module's parameter `weight`: the weight itself, a residual or codes."""
        return cast(Tensor, self.module.weight)

    @property
    def module_class(self) -> type[nn.Module] | None:
        """The class of torch or transformers that computes this kind of function: nn.Linear, Conv1D, nn.Embedding or a
        convolution; None for any other."""
        return next((known for known in _MODULE_CLASSES if issubclass(self.dense_type, known)), None)

    @property
    def dense_type(self) -> type[nn.Module]:
        """The class of a dense module that would replace the base: `module_class`, or a subclass of it."""
        return type(self.module)

    @property
    def form(self) -> Form:
        """The form in which the weight is kept."""
        return IMPLICIT

    @property
    def residual(self) -> Tensor | ops.QuantizedWeight | None:
        """The residual of a stored base, as pissa.ops takes it; None if the whole weight is kept."""
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a dense weight; None for codes, which do not show it."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the module computes: its weight's device, or the one to which accelerate or FSDP fetches it."""
        return whole_device(self.parameter)

    @abstractmethod
    def matrix(self) -> Tensor:
        """The weight [out, in]: the module's own tensor or a view of it if that is dense, otherwise decoded to float32.
        A dense weight that is sharded is gathered, so all processes must call this together."""

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ [k, out], float32 and without the bias, for x float32 [k, in]."""
        return ops.linear(x, self.matrix().detach())

    def fuse_product(self) -> None:  # noqa: B027  most bases leave it
        """Makes a dense module in memory compute training steps in one product with its adapter on a CPU, where that is
        faster. The output is the same within rounding, and a change of zero leaves its bits."""

    def operand_for(self, start: StartFactors, scaling: float, x: Tensor) -> Operand | None:
        """The weight that `ops.linear` takes together with an adapter of that start and scaling, for an input like `x`.
        None if the module computes its own product."""
        return None

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The matrix [out, in] in the shape of a dense weight of this kind."""
        return as_weight(self.dense_type, matrix, whole_shape(self.parameter))

    def shown_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that other code sees: the module's parameter or, if that is a residual or our own codes, the
        decoded weight in `dtype`."""
        return self.parameter

    @abstractmethod
    def dense_module(self, matrix: Tensor) -> nn.Module:
        """A dense module that replaces the base. Its weight is `matrix` [out, in], frozen. Everything else, including
        the bias, is the base's own."""

    def restore_module(self) -> nn.Module:
        """The module that is put back into the model when the adapters are unloaded."""
        return cast(nn.Module, self.module)

    @abstractmethod
    def with_parameter(self, weight: Tensor) -> Base:
        """A base like this one over another parameter `weight` of the same shape."""


def unshard(base: Base, gathered: Tensor | None) -> Base:
    """Returns `base` or, if its weight is sharded, a base like it that holds the full weight, `gathered`. Raises
    ValueError if the weight is sharded and nothing has been gathered."""
    if not is_sharded(base.parameter):
        return base
    if gathered is None:
        raise ValueError(
            "a base weight was sharded before its fingerprint was known: call torch.distributed.init_process_group "
            "before pissa.wrap, or give save_pretrained a state_dict that has the frozen weights too [P052]"
        )
    return base.with_parameter(gathered)

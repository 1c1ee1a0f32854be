"""Bases over a module's own weight: the matrix [out, in] that PiSSA decomposes is a view of it. Only this module
handles offloading: a weight is fetched when it is read. A sharded weight is gathered when it is read, so all processes
must read it together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pissa import ops
from pissa.base.forwards import computes_steps, replace_forward
from pissa.base.lazy_tensor import LazyTensor
from pissa.base.protocol import Base, Operand, as_matrix, as_weight
from pissa.base.start import KeepsDtype, StartFactors
from pissa.distributed import is_sharded, whole_tensor
from pissa.ops.checks import FLOATS
from pissa.ops.formats import READ

# ---- Modules ---------------------------------------------------------------------------------------------------------


in_memory = align_module_device
"""For a block, fetches the weights of a module that accelerate has offloaded to memory or disk. Tensors that the block
keeps stay valid."""


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches the module's weights when it is called. Until then they are on the meta device."""
    return bool(has_offloaded_params(module))


class WeightOnDisk(AlignDevicesHook):  # type: ignore[misc]
    """Accelerate's hook for a module whose weight is read from a file each time that it is fetched. Until then the
    weight is on the meta device, in the dtype to which what is read is cast. The rest of the module is in memory.

    Args:
        read: reads the weight.
        device: where the module computes.
    """

    def __init__(self, read: Callable[[], Tensor], device: torch.device) -> None:
        super().__init__(device, offload=True)
        self._read = read

    def init_hook(self, module: Any) -> Any:
        return module

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._empty = module.weight
        weight = self._read().to(self.execution_device, self._empty.dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        module.weight = self._empty
        return output


def leave_on_disk(module: nn.Module, read: Callable[[], Tensor], device: torch.device) -> None:
    """Lets a module on the meta device fetch its weight by `read` whenever it is needed; see `WeightOnDisk`."""
    add_hook_to_module(module, WeightOnDisk(read, device))


def has_hooks(called: Any) -> bool:
    """Whether torch calls hooks when it calls a module, or in its backward. A function has none."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(called, name, None) for name in names)


def copy_without_hooks(module: Any) -> Any:
    """A shallow copy of a module, without accelerate's hooks, which would call the original."""
    copied = copy.copy(module)
    for name in ("forward", "_old_forward", "_hf_hook"):
        vars(copied).pop(name, None)
    return copied


def with_weight(module: Any, weight: Tensor) -> Any:
    """A copy of a module that holds another weight, frozen."""
    copied = copy_without_hooks(module)
    copied._parameters = module._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
    return copied


def dense_linear(dense_type: type[nn.Module], matrix: Tensor, bias: nn.Parameter | None, training: bool) -> nn.Module:
    """A linear module of a class such as nn.Linear or Conv1D. Its weight is `matrix` [out, in], frozen."""
    with torch.device("meta"):
        linear: Any = dense_type(*(matrix.shape if issubclass(dense_type, Conv1D) else matrix.mT.shape))
    weight = as_weight(dense_type, matrix, matrix.shape).contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return cast(nn.Module, linear.train(training))


# ---- A dense module whose product is fused with its adapter's --------------------------------------------------------

_FEW_ROWS = 16
"""Up to so many rows, torch's product is the faster one."""


def _product(module: Any, input: Tensor) -> Tensor:
    if not _takes(module, input):
        return cast(Tensor, type(module).forward(module, input))
    return ops.linear(input, module.weight, module.bias)


_product.__name__ = "forward"  # pickle finds it by this name, so a loaded model is not fused


def _takes(module: Any, x: Tensor) -> bool:
    """Whether a module whose product is fused computes that of `x` with `ops.linear`."""
    few_rows = x.numel() <= _FEW_ROWS * x.shape[-1]
    if few_rows or module.weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return computes_steps(module) and _is_ready(module)


def _is_ready(module: Any) -> bool:
    """Whether a module's weight is frozen, in a dtype of ours, and all of it is in memory."""
    weight = module.weight
    known = weight.dtype in FLOATS and weight.device.type == "cpu"
    return known and not weight.requires_grad and not is_sharded(weight)


# ---- Bases -----------------------------------------------------------------------------------------------------------


class Dense(Base):
    """A base that is a module of torch or transformers. Its weight is dense and stays as it is."""

    start = None

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        with in_memory(self.module):
            return cast("nn.Parameter | None", getattr(self.module, "bias", None))

    @property
    def device(self) -> torch.device:
        return torch.device(self.module._hf_hook.execution_device) if is_offloaded(self.module) else super().device

    def matrix(self) -> Tensor:
        with in_memory(self.module):
            return as_matrix(self.dense_type, whole_tensor(self.parameter))

    def dense_module(self, matrix: Tensor) -> nn.Module:
        module = self._dense_module(matrix)
        if is_offloaded(self.module):  # and the device where it computes may have no room for more weights
            hook = self.module._hf_hook
            add_hook_to_module(
                module, AlignDevicesHook(hook.execution_device, offload=True, io_same_device=hook.io_same_device)
            )
        return module

    def _dense_module(self, matrix: Tensor) -> nn.Module:
        """The dense module, which stays in memory."""
        module = with_weight(self.module, self.as_weight(matrix).contiguous())
        if "bias" in module._parameters:
            module.register_parameter("bias", self.bias)
        return cast(nn.Module, module)

    def with_parameter(self, weight: Tensor) -> Dense:
        return type(self)(with_weight(self.module, weight))

    def fuse_product(self) -> None:
        module, is_measured = self.module, ops.build_info()["isa"] != "amxbf16"  # torch multiplies by tiles there
        is_free = type(module) is nn.Linear and "forward" not in vars(module)
        if is_free and is_measured and _is_ready(module) and module.weight.is_contiguous():
            replace_forward(module, _product, "dense layers")

    def operand_for(self, start: StartFactors, scaling: float, x: Tensor) -> Operand | None:
        """The weight, after `fuse_product`, unless the module has hooks, which would not be called."""
        is_fused = getattr(vars(self.module).get("forward"), "__func__", None) is _product
        is_fused = is_fused and not has_hooks(self.module) and _takes(self.module, x)
        return Operand(self.module.weight, True) if is_fused else None


class OwnBase(KeepsDtype, Base):
    """A linear base that is a module of ours and replaces the model's own."""

    weight: nn.Parameter
    in_features: int
    out_features: int

    dense_type: type[nn.Module] = nn.Linear
    dtype: torch.dtype | None = None

    @property
    def module(self) -> Any:
        return self

    def shown_weight(self, dtype: torch.dtype) -> Tensor:
        return LazyTensor.of((self.out_features, self.in_features), dtype, self.device, self.matrix)

    def dense_module(self, matrix: Tensor) -> nn.Module:
        return dense_linear(self.dense_type, matrix, self.bias, self.training)

    def with_parameter(self, weight: Tensor) -> Base:
        return cast(Base, with_weight(self, weight))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class HoldsCodes(OwnBase):
    """A base whose parameter `weight` holds the packed codes of a matrix, frozen. The scales are buffers.

    `quant_storage` is the dtype of `weight`, as in bitsandbytes: uint8, or a floating dtype. An element of a floating
    dtype is several bytes of codes, and zeros fill up the last one. Such an element means nothing and may be NaN. It is
    moved but never used in computations, and keeps its dtype and bits whatever dtype the module is cast to.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def store_codes(self, matrix: ops.QuantizedWeight, quant_storage: torch.dtype) -> None:
        """Stores the codes and scales of `matrix` as they are."""
        self.format, self.matrix_shape, self.blocksize = matrix.format, matrix.shape, matrix.blocksize
        self.quant_storage, self._bytes = quant_storage, len(matrix.codes)
        missing = -len(matrix.codes) % quant_storage.itemsize
        codes = functional.pad(matrix.codes, (0, missing)) if missing else matrix.codes
        self.weight = nn.Parameter(codes.view(quant_storage), requires_grad=False)
        self.register_buffer("absmax", matrix.absmax)
        self.register_buffer("nested_absmax", matrix.nested_absmax)
        self.register_buffer("offset", matrix.offset)

    @property
    def quantized(self) -> ops.QuantizedWeight:
        """The matrix [out, in], as pissa.ops takes it. Raises TypeError if a cast has destroyed the codes."""
        codes: Tensor = self.weight
        if codes.dtype != self.quant_storage:
            raise TypeError(
                f"Codes stored as {self.quant_storage} were cast to {codes.dtype}: FSDP's mixed precision does so "
                'where its param_dtype is another. Give PissaConfig quant_storage of that dtype, or "uint8"'
            )
        if self.quant_storage != torch.uint8:
            codes = codes.view(torch.uint8)[: self._bytes]
        return ops.QuantizedWeight(
            codes, self.absmax, self.nested_absmax, self.offset, self.format, self.matrix_shape, self.blocksize
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.offset is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if tensor is self.weight and new.dtype != tensor.dtype else new

        return super()._apply(move, recurse)


class WholeCodes(HoldsCodes):
    """A base whose whole weight is codes. Its fingerprint is that of the weight into which libraries decode them:
    bfloat16, or float32 for GGUF's."""

    start = None
    is_quantised = True

    @property
    def fingerprint_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        return torch.float32 if READ[self.format].is_read_only else torch.bfloat16


class CodedLinear(WholeCodes):
    """A linear base over codes: y = x Qᵀ + b is computed from them directly."""

    def __init__(
        self, weight: ops.QuantizedWeight, bias: nn.Parameter | None, quant_storage: torch.dtype = torch.uint8
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.store_codes(weight, quant_storage)
        self.bias = bias

    def matrix(self) -> Tensor:
        """The weight in float32 [out, in]."""
        return ops.dequantize(self.quantized)

    def product(self, x: Tensor) -> Tensor:
        """The output without the bias."""
        return ops.linear(x, self.quantized)

    def operand_for(self, start: StartFactors, scaling: float, x: Tensor) -> Operand | None:
        """The codes, which are the whole weight."""
        return Operand(self.quantized, True)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format}, blocksize={self.blocksize}"


class CodedEmbedding(WholeCodes):
    """An embedding over codes [vocabulary, dim]. Rows are decoded when they are looked up, to the dtype that the dense
    weight would have. `template` is the dense module without its weight."""

    template: Any

    def __init__(self, weight: ops.QuantizedWeight, module: Any) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.in_features, self.out_features = weight.shape
        self.padding_idx, self.looked_up_dtype = module.padding_idx, module.weight.dtype
        self.store_codes(weight, torch.uint8)
        template = copy_without_hooks(module)
        template._parameters = {"weight": None}
        vars(self)["template"] = template  # hidden from those who look for embeddings among the modules

    @property
    def embed_scale(self) -> Any:
        """The factor of what is looked up; only some models have one."""
        return self.template.embed_scale

    @property
    def dense_type(self) -> type[nn.Module]:  # type: ignore[override]
        return type(self.template)

    def matrix(self) -> Tensor:
        """The weight in float32, transposed: [dim, vocabulary]."""
        return ops.dequantize(self.quantized).mT

    def shown_weight(self, dtype: torch.dtype) -> Tensor:
        return LazyTensor.of(self.quantized.shape, dtype, self.device, lambda: ops.dequantize(self.quantized))

    def dense_module(self, matrix: Tensor) -> nn.Module:
        return cast(nn.Module, with_weight(self.template, matrix.mT.contiguous()).train(self.training))

    def forward(self, input: Tensor) -> Tensor:
        rows = ops.embedding(input, self.quantized, self.looked_up_dtype)
        scale = getattr(self.template, "embed_scale", 1.0)
        return rows * (scale.to(rows) if isinstance(scale, Tensor) else scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.looked_up_dtype = fn(torch.empty(0, dtype=self.looked_up_dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}, blocksize={self.blocksize}"

"""A GPU for tests on a machine without one: tensors that say they are on "cuda:0" and compute on the CPU.

    with CudaStandIn() as gpu:
        model = gpu.put(model)
        pissa.wrap(model, r=4)
    assert not gpu.reads

Inside the block code that asks for a device takes the way that it takes on a GPU, and what crosses between the devices
is written down: `reads` by the host, each of which waits for the GPU, and `sends` to the GPU. A tensor is on the GPU if
its memory is. The memory is the CPU's, so that types, autograd, views and the pissa ops are the real ones; to a
function mode all questions about devices come, and all requests to move, and to a dispatch mode every op, those below
autograd too. What an op computes from tensors of the GPU is there. As on a GPU, mixing the devices is an error, so is
`numpy()`, and so is a generator of the CPU. torch.save writes the device of a tensor, and torch.load follows it.

What is not seen: waits inside a compiled op; `tensor.device` asked for inside an op that is written in Python, where
torch suspends function modes; a gradient that goes back to a leaf on the CPU says that it is on the GPU.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pissa.ops import _load

DEVICE = torch.device("cuda:0")
_CPU = torch.device("cpu")
_HERE = Path(__file__).name
_ATEN = torch.ops.aten


_STORAGES: dict[int, StorageWeakRef] = {}
"""The memory that is the GPU's, of all stand-ins, by its address. A weak reference keeps the address of a storage from
being given to another one, but does not keep the memory."""


def _tag(storage: Any) -> str | None:
    """What torch.save writes of memory that is the GPU's."""
    return str(DEVICE) if storage._cdata in _STORAGES else None


def _restored(storage: Any, location: str) -> Any:
    """What torch.load makes of memory that was written so, or is asked for there."""
    if not location.startswith("cuda"):
        return None
    _STORAGES[storage._cdata] = StorageWeakRef(storage)
    return storage


_PACKAGE = (0, _tag, _restored)
"""For torch.serialization, before the one for the CPU."""


def _for_both(setting: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """A setting of autocast for the GPU, which is the CPU's too, as that computes."""

    def set_for_both(device: str, value: Any) -> None:
        setting(device, value)
        if device == DEVICE.type:
            setting(_CPU.type, value)

    return set_for_both


class Transfer(NamedTuple):
    """Data that has crossed between host and GPU."""

    what: str
    """The function that was called."""
    bytes: int
    waits: bool
    """Whether the host waits for the GPU. It does not for a copy that is asked to be non-blocking."""
    where: str
    """The line of pissa that asked for it, or of the test."""


class CudaStandIn:
    """The GPU, for the length of a `with` block. What is on it stays there for the next one."""

    def __init__(self) -> None:
        self.reads: list[Transfer] = []
        self.sends: list[Transfer] = []
        self.compiled: Any = None
        """For the modes: the compiled function that runs on tensors of the GPU, if one does. What it makes, it makes
        where they are: as attention its causal mask."""
        self._active = contextlib.ExitStack()

    def __enter__(self) -> CudaStandIn:
        for address in [address for address, storage in _STORAGES.items() if storage.expired()]:
            del _STORAGES[address]
        patch = self._active.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(_load, "cuda_problem", None)
        registry = [_PACKAGE, *torch.serialization._package_registry]
        patch.setattr(torch.serialization, "_package_registry", registry)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        for name in ("set_autocast_enabled", "set_autocast_dtype"):
            patch.setattr(torch, name, _for_both(getattr(torch, name)))
        self._active.enter_context(_Ops(self))
        self._active.enter_context(_Functions(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active.close()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return tensor.layout == torch.strided and _address(tensor) in _STORAGES

    def put(self, value: Any) -> Any:
        """A tensor or a module of the CPU on the GPU, which is not counted."""
        sends = len(self.sends)
        value = value.to(DEVICE)
        del self.sends[sends:]
        return value

    def fetch(self, value: Tensor) -> Tensor:
        """A tensor of the GPU on the CPU, which is not counted."""
        reads = len(self.reads)
        value = value.detach().cpu()
        del self.reads[reads:]
        return value

    def forget(self) -> None:
        """Begins anew with what has crossed."""
        self.reads.clear()
        self.sends.clear()

    def waits(self) -> int:
        """How often the host has waited for the GPU."""
        return sum(transfer.waits for transfer in (*self.reads, *self.sends))

    def bytes_read(self) -> int:
        """What has come to the host."""
        return sum(transfer.bytes for transfer in self.reads)

    # -- for the modes

    def adopt(self, tensor: Tensor) -> Tensor:
        """The tensor, whose memory is the GPU's from now on. A sparse one has none, and stays on the CPU."""
        if tensor.layout == torch.strided:
            _STORAGES[_address(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def arrived(self, tensor: Tensor) -> Tensor:
        """The tensor, whose memory is the CPU's from now on."""
        if tensor.layout == torch.strided:
            _STORAGES.pop(_address(tensor), None)
        return tensor

    def read(self, what: str, bytes: int, waits: bool = True) -> None:
        self.reads.append(Transfer(what, bytes, waits, _caller()))

    def sent(self, what: str, bytes: int, waits: bool = True) -> None:
        self.sends.append(Transfer(what, bytes, waits, _caller()))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _caller() -> str:
    frame: Any = sys._getframe(1)
    last = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name != _HERE:
            place = f"{'/'.join(path.parts[-2:])}:{frame.f_lineno}"
            if "pissa" in path.parts or "tests" in path.parts:
                return place
            last = last or place
        frame = frame.f_back
    return last


# ---- Functions -------------------------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    """Answers what is asked about devices, and moves tensors."""

    def __init__(self, gpu: CudaStandIn) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # as of any memory of the CPU, here too
        name = getattr(func, "__name__", str(func))
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and name == "__get__":
            return self._attribute(func, tensor)
        if tensor is not None and name in _MOVES and func is getattr(Tensor, name, None):
            return self._moved(name, tensor, *args[1:], **kwargs)
        if func is Tensor.backward:  # with this mode, for what backward passes ask
            with self:
                return torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)
        if tensor is not None and self.gpu.has(tensor):
            if func is Tensor.__deepcopy__:  # copies the memory of a tensor, not by an op
                return self.gpu.adopt(func(*args, **kwargs))
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")
            if func is Tensor.get_device:
                return DEVICE.index
            if func is Tensor.tolist:
                self.gpu.read("tolist", _bytes(tensor))
        if isinstance(func, _COMPILED) and self.gpu.compiled is None:
            there = any(isinstance(value, Tensor) and self.gpu.has(value) for value in tree_leaves((args, kwargs)))
            self.gpu.compiled = func if there else None
            try:
                return self._made(func, name, args, kwargs)
            finally:
                self.gpu.compiled = None
        return self._made(func, name, args, kwargs)

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        if self.gpu.has(tensor):
            if func == Tensor.device.__get__:
                return DEVICE
            if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
                return func == Tensor.is_cuda.__get__
        return func(tensor)

    def _made(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function computes that is told where."""
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in (_CPU.type, DEVICE.type):
            return func(*args, **kwargs)
        device = torch.device(device)
        if device.type != "cpu":
            _check_generators(kwargs)
        found = func(*args, **kwargs | {"device": _CPU})
        if device.type == "cpu" or not isinstance(found, Tensor):
            return self.gpu.arrived(found) if isinstance(found, Tensor) else found
        if name in ("tensor", "as_tensor", "new_tensor", "asarray"):
            self.gpu.sent(name, _bytes(found))
            found = found.clone()  # as_tensor may give its argument
        return self.gpu.adopt(found)

    def _moved(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`to`, `cpu`, `cuda` and `type_as`, in any of their forms."""
        device = {"cpu": _CPU, "cuda": DEVICE}.get(name)
        rest: list[Any] = []
        for value in (*args, *(kwargs.pop(key) for key in ("device", "dtype", "other") if key in kwargs)):
            if isinstance(value, Tensor):
                device = self._attribute(Tensor.device.__get__, value)
                rest.append(value.dtype)
            elif isinstance(value, (str, torch.device)) or type(value) is int:
                device = torch.device(value)
            elif value is not None:
                rest.append(value)
        here = self._attribute(Tensor.device.__get__, tensor)
        waits = not (kwargs.pop("non_blocking", False) or any(value is True for value in rest[1:]))
        dtype = next((value for value in rest if isinstance(value, torch.dtype)), tensor.dtype)
        if device is None or device.type == here.type or "meta" in (device.type, here.type):
            at = {} if device is None or device.type != "meta" else {"device": device}
            return tensor.to(dtype=dtype, **at, **kwargs)
        what = f"{name}({device})"
        if device.type == "cpu":
            self.gpu.read(what, _bytes(tensor), waits)
            return self.gpu.arrived(tensor.to(dtype=dtype, copy=True))
        self.gpu.sent(what, _bytes(tensor), waits)
        return self.gpu.adopt(tensor.to(dtype=dtype, copy=True))


_COMPILED = (types.BuiltinFunctionType, types.MethodDescriptorType)
_MOVES = ("to", "cpu", "cuda", "type_as")


def _check_generators(arguments: Any) -> None:
    """All that there are without a GPU are the CPU's."""
    if any(isinstance(value, torch.Generator) for value in tree_leaves(arguments)):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({_caller()})")


# ---- Ops -------------------------------------------------------------------------------------------------------------


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an op writes to."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    writes = (a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return [given[name] for name in writes if name in given]


class _Ops(TorchDispatchMode):
    """Sees every op: finds where its results are, and what it makes the host wait for."""

    def __init__(self, gpu: CudaStandIn) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there = [tensor for tensor in tensors if self.gpu.has(tensor)]
        if not there:
            found = func(*args, **kwargs)
            made = self.gpu.compiled is not None and not tensors and isinstance(found, Tensor)
            return self.gpu.adopt(found) if made else found
        self._cross(func, args, kwargs, tensors)
        found = func(*args, **kwargs)
        here = {_address(t) for t in tensors if t.layout == torch.strided and not self.gpu.has(t)}
        for result in tree_leaves(found):
            if isinstance(result, Tensor) and result.layout == torch.strided and _address(result) not in here:
                self.gpu.adopt(result)
        return found

    def _cross(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        """Writes down what the op takes from one device to the other. Refuses what torch does not take there."""
        here = [tensor for tensor in tensors if not self.gpu.has(tensor)]
        if func.namespace == "aten":  # whose kernels read a number of the CPU, but write none
            written = [id(tensor) for tensor in tree_leaves(_written(func, args, kwargs))]
            here = [tensor for tensor in here if tensor.dim() > 0 or id(tensor) in written]
        _check_generators((args, kwargs))
        if func is _ATEN.copy_.default:
            to, source = args[:2]
            if self.gpu.has(to) != self.gpu.has(source):
                waits = not (kwargs.get("non_blocking", False) or (len(args) > 2 and args[2]))
                crossed = self.gpu.sent if self.gpu.has(to) else self.gpu.read
                crossed("copy_", _bytes(source), waits)
            return
        if func in (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default):
            indices = [index for index in args[1] if index is not None]
            for index in indices:
                if not self.gpu.has(index):
                    self.gpu.sent(str(func), _bytes(index))
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.gpu.read(str(func), 8)
            here = [tensor for tensor in here if all(tensor is not index for index in indices)]
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.gpu.read(str(func), 8)
        if here:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got some of shape "
                f"{[list(tensor.shape) for tensor in here]} on the CPU and others on {DEVICE} ({_caller()})"
            )

"""The rest of a base: the tensors that no adapter changes, such as norms, embeddings and biases. An exact restart needs
them unchanged too."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pissa.base.digest import Match, dtype_of, fingerprint, match
from pissa.base.remembered import tensor_state
from pissa.distributed import is_managed, is_sharded
from pissa.layers.layer import PissaLayer


class Rest:
    """The rest of a model's base: floating parameters and persistent buffers. Left out are the weights of adapted
    layers, modules that an adapter trains as a whole or in some rows, statistics of batches, which a training changes,
    and what cannot be read without gathering: sharded and offloaded tensors. Fingerprints are computed once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[object, ...], str]] = {}

    def fingerprints(self, base: nn.Module, left_out: Container[int]) -> dict[str, str]:
        """The fingerprints of the rest of an (unwrapped) model, by name, without tensors that are trained, and without
        those whose ids are given. A tensor that has several names has one here."""
        unique: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in tensors(base):
            if not tensor.requires_grad and id(tensor) not in left_out:
                unique.setdefault(id(tensor), (name, tensor))
        return {name: self._fingerprint(name, tensor) for name, tensor in unique.values()}

    def compare(self, base: nn.Module, recorded: Mapping[str, str]) -> dict[str, tuple[Match, Tensor]]:
        """Compares the rest of an (unwrapped) model with recorded fingerprints, and returns what is not the same."""
        other: dict[str, tuple[Match, Tensor]] = {}
        for name, tensor in tensors(base):
            if (wanted := recorded.get(name)) is None:
                continue
            same_dtype = tensor.dtype == dtype_of(wanted)
            result = Match.SAME if same_dtype and self._fingerprint(name, tensor) == wanted else match(wanted, tensor)
            if result is not Match.SAME:
                other[name] = result, tensor
        return other

    def _fingerprint(self, name: str, tensor: Tensor) -> str:
        state, known = tensor_state(tensor), self._known.get(name)
        if known is None or known[0] != state:
            known = self._known[name] = state, fingerprint(tensor)
        return known[1]


def tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The rest of an (unwrapped) model, by the names that it has without adapters."""
    if is_managed(base):
        return
    for name, tensor in _tensors(base, ""):
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta and not is_sharded(tensor):
            yield name, tensor


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    if isinstance(module, PissaLayer):
        if (bias := getattr(module.base.module, "bias", None)) is not None:
            yield f"{prefix}bias", bias
        return
    buffers = {} if isinstance(module, _NormBase) else dict(module.named_buffers(recurse=False))
    for name, tensor in {**dict(module.named_parameters(recurse=False)), **buffers}.items():
        if name not in module._non_persistent_buffers_set:
            yield f"{prefix}{name}", tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{prefix}{name}.")

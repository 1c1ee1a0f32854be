"""Tokens that are trained in addition to the adapter (`trainable_token_indices`): PEFT's layers, with faults fixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import peft.utils
import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer as PeftTokensLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  everybody's name for it

from pissa.base.classes import base_of
from pissa.base.weights import is_offloaded
from pissa.layers.layer import PissaLayer


class TrainableTokensLayer(PeftTokensLayer):  # type: ignore[misc]
    """PEFT's layer, which replaces rows of an embedding or of an output layer. Ours keeps an output layer's bias, and
    can merge an adapter that trains no tokens."""

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output with the rows of these adapters."""
        base = self.base_layer
        is_adapted = bool(active_adapters) and not self.disable_adapters and not self.merged
        if is_adapted and base_of(base).module_class is nn.Linear:
            return F.linear(x, self.get_merged_weights(active_adapters), base.bias)
        return cast(Tensor, super().forward_adapters(x, active_adapters, *args, **kwargs))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the rows of those adapters that train tokens into the weight, in place."""
        super().merge(safe_merge=safe_merge, adapter_names=_names_that_train(self, adapter_names))

    def unmerge(self) -> None:
        """Restores the base's rows, bit for bit."""
        if self.merged:
            super().unmerge()

    def unmerge_weight(self, weight: Tensor) -> Tensor:
        """Returns `weight`, the layer's own, without the rows of merged adapters."""
        for name in self.merged_adapters:
            weight = weight.index_copy(0, *self._rows(name, weight))
        return weight

    def store_originals(self) -> None:
        """Stores the current rows of the layer's weight. No adapter may be merged into it."""
        for name, originals in self.trainable_tokens_original.items():
            index, _ = self._rows(name, originals)
            originals.copy_(self.base_layer.weight.detach()[index])

    def _rows(self, adapter_name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        index = like.new_tensor(self.token_indices[adapter_name], dtype=torch.long)
        return index, self.trainable_tokens_original[adapter_name].to(like)


class TrainableTokensWrapper(peft.utils.TrainableTokensWrapper):  # type: ignore[misc]
    """PEFT's module that replaces an embedding. With ours, an adapter that trains no tokens can be saved, loaded and
    named for some rows of a batch together with one that trains some. Unloading without merging returns the base."""

    def trains(self, adapter_name: str) -> bool:
        """Whether the adapter trains tokens of this module."""
        return adapter_name in self.token_adapter.trainable_tokens_delta

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The output. `adapter_names` gives each row of the input its own adapter, "__base__" for none."""
        if adapter_names is not None:
            kwargs["adapter_names"] = [name if self.trains(name) else "__base__" for name in adapter_names]
        return cast(Tensor, super().forward(*args, **kwargs))

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter under the names of PEFT's files."""
        return super().adapter_state_dict(adapter_name, state_dict) if self.trains(adapter_name) else {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The names of these tensors in the module, by their names in PEFT's files."""
        return super().adapter_state_dict_load_map(adapter_name) if self.trains(adapter_name) else {}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the module that replaces this one in the model: merged, or the base."""
        if not merge:
            self.token_adapter.unmerge()
        return cast(
            nn.Module,
            super().unload_and_optionally_merge_module(merge, safe_merge=safe_merge, adapter_names=adapter_names),
        )


def mend_token_layers(model: nn.Module) -> None:
    """Replaces PEFT's token layers, which have just been put into an (unwrapped) model, by ours. Raises TypeError or
    ValueError that names a layer whose tokens cannot be trained, and what to do instead."""
    for name, module in model.named_modules():
        if isinstance(module, peft.utils.TrainableTokensWrapper):
            parent = model.get_submodule(name.rpartition(".")[0])
            base = module.token_adapter.base_layer
            if isinstance(parent, PissaLayer):
                _refuse_tied(name.rpartition(".")[0], "target_modules")
            if isinstance(base, peft.utils.ModulesToSaveWrapper):
                _refuse_tied(name, "modules_to_save")
            weight = getattr(base, "weight", None)
            if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point():
                raise TypeError(
                    f"trainable_token_indices replaces rows of a dense weight, and {name} is a {type(base).__name__}: "
                    "leave it out [P026]"
                )
            if is_offloaded(base):
                raise ValueError(
                    f"{name} is offloaded, and trainable_token_indices replaces rows of a weight that is in memory: "
                    "give it a device of its own in device_map [P026]"
                )
            module.__class__ = TrainableTokensWrapper
            module.token_adapter.__class__ = TrainableTokensLayer


def _refuse_tied(name: str, field: str) -> None:
    leaf = name.rpartition(".")[2]
    raise TypeError(
        f"{name} is in {field}, and its weight is tied to an embedding whose tokens are trained "
        f"(trainable_token_indices), which trains the same rows of {leaf} as well: leave {leaf!r} out of {field}, or "
        "load the model with tie_word_embeddings=False [P026]"
    )


def check_tokens_can_be_merged(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raises ValueError if the (unwrapped) model's weights cannot hold the trained tokens of all the adapters: two
    adapters train the same token, or a weight is shared with a layer that trains other tokens or none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TrainableTokensLayer)}
    for name, layer in layers.items():
        merging = _names_that_train(layer, adapter_names)
        seen: set[int] = set()
        for adapter in dict.fromkeys([*layer.merged_adapters, *merging]):
            if both := seen.intersection(layer.token_indices[adapter]):
                raise ValueError(
                    f"Token indices of adapter {adapter} are already defined and would result in undefined merging "
                    f"behavior: {sorted(both)} are trained by another adapter too; merge one of the adapters only"
                )
            seen.update(layer.token_indices[adapter])
        rows = layer.trainable_tokens_delta  # shared by the layers that PEFT has tied
        alike = {tied.base_layer for tied in layers.values() if tied.trainable_tokens_delta is rows}
        for other, module in model.named_modules() if _changes(layer, merging) else ():
            shares_weight = any(tensor is layer.base_layer.weight for tensor in module._parameters.values())
            if shares_weight and module not in alike:
                raise ValueError(
                    f"the tokens of {name.removesuffix('.token_adapter')} are trained apart from {other}, with which "
                    "it shares its weight, and merging would write them into both: give both layers the same "
                    "trainable_token_indices, or load the adapter onto a model with tie_word_embeddings=False and "
                    "merge it there"
                )


def _names_that_train(layer: PeftTokensLayer, adapter_names: Iterable[str] | None) -> list[str]:
    """Those of the given adapters, or of the active ones, that train tokens of the layer."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name in layer.trainable_tokens_delta]


def _changes(layer: TrainableTokensLayer, adapter_names: Iterable[str]) -> bool:
    """Whether the adapters' rows differ from those of the layer's weight."""
    weight = layer.base_layer.weight.detach()
    return any(
        not torch.equal(weight[layer.token_indices[name]], layer.trainable_tokens_delta[name].detach().to(weight))
        for name in adapter_names
    )

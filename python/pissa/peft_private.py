"""Every private name of PEFT that this package uses, and every function of PEFT that it replaces.

All of them exist in peft 0.21 and later. Each is here because no public name does the same; the reason is next to it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, wraps
from types import FunctionType
from typing import Any

from peft import LoraConfig, PeftModel, mapping_func
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraModel
from peft.utils import PeftType, transformers_weight_conversion
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

# -- which layers PEFT adapts, and by which classes


def build_layers_with(config: LoraConfig, factory: Callable[..., nn.Module]) -> None:
    """Makes PEFT build every layer with `factory(target, adapter_name, config=config, **kwargs)`.

    `LoraConfig._register_custom_module`: PEFT documents it, as experimental, for custom LoRA layers.
    """
    config._register_custom_module({nn.Module: factory})


def all_linear(config: LoraConfig, model: nn.Module) -> set[str]:
    """The names of the layers that "all-linear" means in `model`.

    `_maybe_include_all_linear_layers`: PEFT determines them while it injects layers, which is too late to choose ranks.
    """
    names: set[str] = tuners_utils._maybe_include_all_linear_layers(copy.copy(config), model).target_modules
    return names


def check_mamba(config: LoraConfig, model: nn.Module, target_name: str) -> None:
    """Raises ValueError for a layer, given by the last part of its name, that PEFT refuses to adapt with LoRA.

    `_check_lora_target_modules_mamba`: it contains the list of such layers. It applies only to LoRA's `peft_type`.
    """
    lora = copy.copy(config)
    lora.peft_type = PeftType.LORA
    tuners_utils._check_lora_target_modules_mamba(lora, model, target_name)


def is_refused_by_peft(config: LoraConfig, model: nn.Module, name: str) -> bool:
    """Whether PEFT refuses to adapt the layer, because kernels of such models read its weight without calling it."""
    with suppress(ValueError):
        check_mamba(config, model, name.rpartition(".")[2])
        return False
    return True


def is_rewritten_by_peft(config: LoraConfig, model: nn.Module) -> bool:
    """Whether PEFT, loading the configuration onto `model`, would mistake some of its targets for fused experts."""
    probe = copy.deepcopy(config)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:  # only some of the targets that are fused into one parameter
        return True
    return bool(probe.target_parameters)


# -- the functions that a program calls, while they are ours


@contextmanager
def take_over(make: Callable[..., nn.Module], load: Callable[..., nn.Module]) -> Iterator[None]:
    """Makes PEFT call us inside the block. `peft.get_peft_model` calls `make(peft_class, model, config, **kwargs)`
    where it would call `peft_class(model, config, **kwargs)`, with PEFT's class of a model.
    `PeftModel.from_pretrained` calls `load(plain, *args, **kwargs)`, where `plain` is PEFT's own.

    `PeftModel` and `MODEL_TYPE_TO_PEFT_MODEL_MAPPING` in `peft.mapping_func`: programs have already imported the
    function, so only the names that it uses itself affect all of them. `PeftModel.from_pretrained`, which restores an
    adapter that PEFT has written, also reads the public table, so that is not changed.
    """
    table, peft_class = mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, mapping_func.PeftModel
    plain = PeftModel.__dict__["from_pretrained"]

    @wraps(plain.__func__)
    def from_pretrained(cls: type[PeftModel], *args: Any, **kwargs: Any) -> nn.Module:
        return load(partial(plain.__func__, cls), *args, **kwargs)

    mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {task: partial(make, model) for task, model in table.items()}
    mapping_func.PeftModel = partial(make, peft_class)
    PeftModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, mapping_func.PeftModel = table, peft_class
        PeftModel.from_pretrained = plain


# -- methods that PEFT's classes call on themselves


class MendedPeftModel(PeftModel):  # type: ignore[misc]
    """A PeftModel with fixes for two of its methods."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Also removes the hooks of `adapter_names` after a forward pass that fails. PEFT leaves them on its layers,
        and every later pass then uses the names of the failed one."""
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        hooks.__enter__()
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)

    def _get_peft_specific_model_tags(self) -> list[str]:
        """Tags the model card as that of a LoRA, which the folder contains. PEFT decides by `peft_type`; ours
        differs."""
        return [*super()._get_peft_specific_model_tags(), "lora"]


class TunerToCome(nn.Module):
    """Given to a PeftModel under construction as its tuner, turns that into the model that `make(adapter_name,
    autocast_adapter_dtype)` returns.

    `_cast_adapter_dtype`: `PeftModel.__init__` calls it, with the last arguments that it passes on, and after that only
    reads the model. No public method gets access to the PeftModel, so a hook of torch notes in which module the tuner
    is placed.
    """

    def __init__(self, make: Callable[[str, bool], nn.Module]) -> None:
        super().__init__()
        self._make, self._parents = make, list[nn.Module]()
        hook = register_module_module_registration_hook(partial(_note_parent, weakref.ref(self)))
        self._remove_hook = weakref.finalize(self, hook.remove)  # also if PEFT fails before it calls

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Makes the model. A subclass of PEFT's classes would lose what it adds and is therefore refused."""
        self._remove_hook()
        (peft_model,) = self._parents
        if not type(peft_model).__module__.startswith(PeftModel.__module__):
            raise TypeError(
                f"a PissaConfig makes a pissa.PissaModel, and {type(peft_model).__name__} is a class of its own; use "
                "pissa.wrap(model, config), or one of PEFT's classes [P012]"
            )
        made = self._make(adapter_name, autocast_adapter_dtype)
        peft_model.__class__ = type(made)
        vars(peft_model).clear()
        vars(peft_model).update(vars(made))


def _note_parent(tuner: weakref.ref[TunerToCome], parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(child, TunerToCome) and child is tuner():
        child._parents.append(parent)


def _fetch_nothing(method: FunctionType) -> FunctionType:
    """Returns a PEFT method that does not fetch the weights of offloaded modules. Our layers fetch what they need.

    `onload_layer` fetches the whole model at once, and afterwards offloads whatever is in the base's place. It is a
    global that other models in the process need, so the method gets its own globals.
    """
    names = {**method.__globals__, "onload_layer": nullcontext}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


class LoraTuner(LoraModel):  # type: ignore[misc]
    """PEFT's LoraModel for a `peft_type` other than LoRA's. A subclass defines what an adapter returns, `hand_out`,
    given what PEFT has found of it in a state dict; and what it accepts, `take_in`: what PEFT is to load, and what is
    to be loaded under the parameters' names.

    `get_peft_model_state_dict` and `set_peft_model_state_dict` look up their tuner in PEFT's public table, and call
    these private methods on it. `_unload_and_optionally_merge` is the body of `unload` and of `merge_and_unload`.
    """

    merge_adapter = _fetch_nothing(LoraModel.merge_adapter)
    unmerge_adapter = _fetch_nothing(LoraModel.unmerge_adapter)
    _unload_and_optionally_merge = _fetch_nothing(LoraModel._unload_and_optionally_merge)

    def _check_target_module_compatiblity(self, peft_config: LoraConfig, model: nn.Module, target_name: str) -> None:
        """Refuses what PEFT refuses for LoRA, which it recognises by the type."""
        check_mamba(peft_config, model, target_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **kwargs)
        lora: dict[str, Tensor] = cls.hand_out(model, config, adapter_name, state_dict, tensors)
        return lora

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        rest, tensors = cls.take_in(model, config, adapter_name, state_dict)
        return {**super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest), **tensors}

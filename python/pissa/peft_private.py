"""Every private name of PEFT that this package uses, and every function of PEFT that it replaces.

All of them are there from peft 0.21 on. Each is here because no public name does the same; the reason is beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from types import FunctionType
from typing import Any

from peft import LoraConfig, PeftModel, mapping_func
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraModel
from peft.utils import PeftType, transformers_weight_conversion
from torch import Tensor, nn

# -- which layers PEFT adapts, and by which classes


def build_layers_with(config: LoraConfig, factory: Callable[..., nn.Module]) -> None:
    """Makes PEFT build every layer by `factory(target, adapter_name, config=config, **kwargs)`.

    `LoraConfig._register_custom_module`: the way that PEFT documents, as experimental, for a LoRA layer of one's own.
    """
    config._register_custom_module({nn.Module: factory})


def all_linear(config: LoraConfig, model: nn.Module) -> set[str]:
    """The names of the layers that "all-linear" means in `model`.

    `_maybe_include_all_linear_layers`: PEFT decides it while it injects layers, too late for choosing their ranks.
    """
    names: set[str] = tuners_utils._maybe_include_all_linear_layers(copy.copy(config), model).target_modules
    return names


def check_mamba(config: LoraConfig, model: nn.Module, target_name: str) -> None:
    """Raises ValueError for a layer, given by the last part of its name, that PEFT refuses to adapt by LoRA.

    `_check_lora_target_modules_mamba`: the list of such layers is inside it. It applies to LoRA's `peft_type` only.
    """
    lora = copy.copy(config)
    lora.peft_type = PeftType.LORA
    tuners_utils._check_lora_target_modules_mamba(lora, model, target_name)


def is_refused_by_peft(config: LoraConfig, model: nn.Module, name: str) -> bool:
    """Whether PEFT refuses to adapt the layer: the kernels of such models read its weight without calling it."""
    try:
        check_mamba(config, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def rewritten_by_peft(config: LoraConfig, model: nn.Module) -> bool:
    """Whether PEFT, loading the configuration onto `model`, would take some of its targets for fused experts."""
    probe = copy.deepcopy(config)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:  # only some of the targets that are fused into one parameter
        return True
    return bool(probe.target_parameters)


# -- what a program calls, for as long as it is asked to be ours


@contextmanager
def models_made_by(make: Callable[..., nn.Module]) -> Iterator[None]:
    """Makes `peft.get_peft_model`, for the block, call `make(kind, model, config, **kwargs)` where it would call
    `kind(model, config, **kwargs)`, kind being PEFT's class of a model.

    `PeftModel` and `MODEL_TYPE_TO_PEFT_MODEL_MAPPING` in `peft.mapping_func`: programs have imported the function by
    then, so that its own names are the only place that all of them pass. The public table is read by
    `PeftModel.from_pretrained` as well, which restores an adapter that PEFT has written, and is left alone.
    """
    table, kind = mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, mapping_func.PeftModel
    mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {task: partial(make, model) for task, model in table.items()}
    mapping_func.PeftModel = partial(make, kind)
    try:
        yield
    finally:
        mapping_func.MODEL_TYPE_TO_PEFT_MODEL_MAPPING, mapping_func.PeftModel = table, kind


@contextmanager
def adapters_loaded_by(load: Callable[..., nn.Module]) -> Iterator[None]:
    """Makes `PeftModel.from_pretrained`, for the block, call `load(plain, *args, **kwargs)`, plain being PEFT's own."""
    plain = PeftModel.__dict__["from_pretrained"]

    @wraps(plain.__func__)
    def from_pretrained(cls: type[PeftModel], *args: Any, **kwargs: Any) -> nn.Module:
        return load(partial(plain.__func__, cls), *args, **kwargs)

    PeftModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        PeftModel.from_pretrained = plain


# -- methods that PEFT's classes call on themselves


class MendedPeftModel(PeftModel):  # type: ignore[misc]
    """A PeftModel with two of its methods mended."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Takes the hooks of `adapter_names` off after a forward pass that fails, too. PEFT leaves them on its layers,
        and every later pass has the names of the failed one."""
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        hooks.__enter__()
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)

    def _get_peft_specific_model_tags(self) -> list[str]:
        """Tags the model card as a LoRA's, which the folder holds. PEFT goes by `peft_type`, and ours is another."""
        return [*super()._get_peft_specific_model_tags(), "lora"]


def started_by_peft(tuner: nn.Module, start: Callable[[str, bool], None]) -> None:
    """Has `PeftModel.__init__`, which is given this tuner, call `start` with `adapter_name` and
    `autocast_adapter_dtype`, the last that it tells of its arguments. After that it only looks at the model.

    `_cast_adapter_dtype`: no public name gets to know the PeftModel that is being made.
    """
    tuner._cast_adapter_dtype = start  # type: ignore[assignment]


def _fetching_nothing(method: FunctionType) -> FunctionType:
    """A method of PEFT that fetches no weights of offloaded modules. Our layers fetch what they need.

    `onload_layer` fetches the whole model at once, and afterwards offloads whatever is in the base's place. It is a
    global, which other models of the process need: so the method has globals of its own.
    """
    names = {**method.__globals__, "onload_layer": nullcontext}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


class LoraTuner(LoraModel):  # type: ignore[misc]
    """PEFT's LoraModel for another `peft_type` than LoRA's. A subclass says what goes out of an adapter, `handed_out`,
    given what PEFT has found of it in a state dict; and what goes in, `taken_in`: what PEFT is to load, and what is to
    be loaded under the parameters' names.

    `get_peft_model_state_dict` and `set_peft_model_state_dict` find their tuner in PEFT's public table, and call these
    private methods on it. `_unload_and_optionally_merge` is the body of `unload` and of `merge_and_unload`.
    """

    merge_adapter = _fetching_nothing(LoraModel.merge_adapter)
    unmerge_adapter = _fetching_nothing(LoraModel.unmerge_adapter)
    _unload_and_optionally_merge = _fetching_nothing(LoraModel._unload_and_optionally_merge)

    def _check_target_module_compatiblity(self, peft_config: LoraConfig, model: nn.Module, target_name: str) -> None:
        """Refuses what PEFT refuses of LoRA, which it tells by the type."""
        check_mamba(peft_config, model, target_name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **kwargs)
        handed_out: dict[str, Tensor] = cls.handed_out(model, config, adapter_name, state_dict, found)
        return handed_out

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        rest, tensors = cls.taken_in(model, config, adapter_name, state_dict)
        return {**super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest), **tensors}

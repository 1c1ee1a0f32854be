"""pytest plugin that runs PEFT's own test suite over our classes: `make test-peft`.

Before PEFT's tests are imported, names that they import from peft are made to stand for ours: `LoraConfig` makes a
PissaConfig with ranks that fit, `PeftModel.from_pretrained` reads what we wrote by `PissaModel`.
Everything else is PEFT's. `hub` makes the models that the tests fetch; `left_out` lists what does not apply, and why.

Outcomes: a test that never reaches our classes is skipped. A test that our code refuses is skipped as well if the
refusal is listed in `left_out.REFUSALS` and has changed nothing in the model; otherwise it fails.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import sys
import types
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, hotswap, save_and_load
from PIL import Image
from torch import nn

import hub
import left_out
import pissa


class Reached:
    """What the test that runs now has done with our classes."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.any = False
        self.refusals: dict[int, tuple[Exception, bool]] = {}
        """By id: what was raised, and whether the model was left as it was."""


reached = Reached()


# ---- What stands for PEFT's names ------------------------------------------------------------------------------------


@dataclass
class LoraConfig(pissa.PissaConfig):
    """A PissaConfig made of what PEFT's tests give a LoraConfig."""

    lora_alpha: float | None = 8  # LoraConfig's default
    random: ClassVar[bool] = False
    """Whether the adapter has to change something from the beginning, PEFT's init_lora_weights=False."""

    def __post_init__(self) -> None:
        reached.any = True
        if self.init_lora_weights is False:
            self.__dict__["random"] = self.init_lora_weights = True
        elif re.fullmatch("gaussian|pissa(_niter_[0-9]+)?", str(self.init_lora_weights)):
            self.init_lora_weights = True
        no_targets = self.target_modules is None
        if no_targets:
            self.target_modules = ["PEFT's default"]  # else all linear layers, which `fitted` replaces
        try:
            super().__post_init__()
        except (TypeError, ValueError) as error:
            reached.refusals[id(error)] = error, True
            raise
        if no_targets:
            self.target_modules = None


def fitted(config: pissa.PissaConfig, model: nn.Module) -> pissa.PissaConfig:
    """A copy with PEFT's default targets where none were given (ours are all linear layers), and with ranks at most the
    smaller side of each weight, the scaling kept: PEFT's tests give the layer 20 x 2 a rank of 8, which we refuse."""
    config = copy.deepcopy(config)
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        config.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, "all-linear")
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim > 1 and not isinstance(module, BaseTunerLayer):
            side = min(len(weight), weight[0].numel())
            if side < config.r:
                config.rank_pattern.setdefault(name, side)
                config.alpha_pattern.setdefault(name, config.lora_alpha * side / config.r)
    return config


def randomise(model: nn.Module, adapter_name: str) -> None:
    """Gives a fresh adapter a change."""
    for name, parameter in model.named_parameters():
        if re.search(rf"lora_(A|B|embedding_A|embedding_B)\.{re.escape(adapter_name)}(\.|$)", name):
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def state(model: Any) -> dict[str, Any]:
    """All that a refusal must leave as it was."""
    if not isinstance(model, nn.Module):
        return {}
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    classes = {name: type(module) for name, module in model.named_modules()}
    return classes | {f"{name}!": t.detach().clone() for name, t in tensors.items() if not t.is_meta}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())


def watched(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose first argument is a model, noting that it was reached and what a refusal has left."""

    @functools.wraps(call)
    def inner(model: Any, *args: Any, **kwargs: Any) -> Any:
        reached.any = True
        before = state(model)
        try:
            return call(model, *args, **kwargs)
        except Exception as error:
            if id(error) not in reached.refusals:
                reached.refusals[id(error)] = error, equal(before, state(model))
            raise

    return inner


def stand_in() -> None:
    """Puts ours in the place of PEFT's names."""
    plain_get, plain_inject = peft.get_peft_model, peft.inject_adapter_in_model
    plain_from = peft.PeftModel.from_pretrained.__func__
    add_adapter = pissa.PissaModel.add_adapter
    made, from_pretrained = watched(plain_get), watched(pissa.PissaModel.from_pretrained)

    @functools.wraps(plain_get)
    def get_peft_model(
        model: nn.Module,
        peft_config: peft.PeftConfig,
        adapter_name: str = "default",
        mixed: bool = False,
        autocast_adapter_dtype: bool = True,
        revision: str | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        rest = (adapter_name, mixed, autocast_adapter_dtype, revision)
        if mixed or not isinstance(peft_config, pissa.PissaConfig):
            return plain_get(model, peft_config, *rest, **kwargs)
        config = fitted(peft_config, model)
        peft_config.target_modules = config.target_modules  # as PEFT does
        wrapped = made(model, config, *rest, **kwargs)
        if getattr(config, "random", False):
            randomise(wrapped, adapter_name)
        return wrapped

    def load(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if not issubclass(cls, pissa.PissaModel) and is_ours(model_id, **kwargs):
            return from_pretrained(model, model_id, *args, **kwargs)
        return plain_from(cls, model, model_id, *args, **kwargs)

    def add(self: pissa.PissaModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        config = fitted(peft_config, self.base_model.model) if isinstance(peft_config, LoraConfig) else peft_config
        result = add_adapter(self, adapter_name, config, *args, **kwargs)
        if getattr(config, "random", False):
            randomise(self, adapter_name)
        return result

    for module in (peft, peft.tuners, peft.tuners.lora):
        module.LoraConfig = LoraConfig

    def inject(peft_config: peft.PeftConfig, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not isinstance(peft_config, LoraConfig):
            return plain_inject(peft_config, model, *args, **kwargs)
        return watched(lambda model: plain_inject(fitted(peft_config, model), model, *args, **kwargs))(model)

    peft.get_peft_model, peft.inject_adapter_in_model = get_peft_model, inject
    peft.PeftModel.from_pretrained = classmethod(load)
    hotswap.hotswap_adapter = watched(hotswap.hotswap_adapter)
    peft.auto.check_file_exists_on_hf_hub = save_and_load.check_file_exists_on_hf_hub = is_in_cache
    pissa.PissaModel.add_adapter = watched(functools.wraps(add_adapter)(add))
    for name in ("load_adapter", "add_weighted_adapter", "save_pretrained"):
        setattr(pissa.PissaModel, name, watched(getattr(pissa.PissaModel, name)))


def is_ours(model_id: Any, subfolder: str | None = None, revision: str | None = None, **kwargs: Any) -> bool:
    """Whether a folder, or a name on the hub, holds an adapter that we have written."""
    folder = Path(str(model_id), subfolder or "")
    if folder.is_dir():
        return (folder / "pissa.json").exists()
    return is_in_cache(str(model_id), str(Path(subfolder or "", "pissa.json")), revision)


def is_in_cache(repo_id: str, filename: str, revision: str | None = None, **kwargs: Any) -> bool:
    """What PEFT asks the hub, which it does not ask offline."""
    with contextlib.suppress(huggingface_hub.errors.HFValidationError):
        return isinstance(huggingface_hub.try_to_load_from_cache(repo_id, filename, revision=revision), str)
    return False


# ---- pytest ----------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: PEFT's")
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers find what the first process has made
        cache = Path(os.environ["HF_HUB_CACHE"])
        hub.make_models(cache)
        hub.make_adapters(cache)
    stand_in()
    for name in ("diffusers", "scipy"):  # big, and imported for tests that do not concern us
        sys.modules[name] = types.ModuleType(name)
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"].__version__ = "0"
    sys.modules["scipy"].stats = None
    sys.path.insert(0, str(config.rootpath))
    from tests import testing_utils

    testing_utils.hub_online_once = contextlib.nullcontext  # it would go online
    testing_utils.load_cat_image = lambda: Image.new("RGB", (64, 64))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        (dropped if why_left_out(item) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def why_left_out(item: pytest.Item) -> str | None:
    """The reason of the first line of the list that fits the test."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for value in parameters.values():
        if isinstance(value, type) and issubclass(value, peft.PeftConfig) and value is not LoraConfig:
            return "another method than LoRA"
    return next((why for pattern, why in left_out.TESTS.items() if re.search(pattern, item.nodeid)), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    reached.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    why = refused(item, call.excinfo.value) if call.excinfo else None
    if not reached.any and (call.excinfo or call.when == "call"):
        why = "reaches none of our classes"
    if why:
        try:
            pytest.skip(why)
        except pytest.skip.Exception:
            call.excinfo = pytest.ExceptionInfo.from_current()
    return (yield)


def refused(item: pytest.Item, error: BaseException | None) -> str | None:
    """The reason of the listed refusal that `error` is, or comes from; None if there is none or it has changed the
    model."""
    while error is not None:
        known, untouched = reached.refusals.get(id(error), (None, False))
        if known is error and untouched:
            text = f"{item.nodeid}: {error}"
            return next(
                (f"refused: {why}" for pattern, why in left_out.REFUSALS.items() if re.search(pattern, text)), None
            )
        error = error.__cause__ or error.__context__
    return None

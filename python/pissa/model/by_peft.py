"""A PissaConfig that is given to PEFT: `peft.get_peft_model(model, config)`, a trainer's `peft_config=`, and
`PeftModel(model, config)`, the class itself. The PeftModel that PEFT makes becomes the one that `wrap` gives.

PEFT makes it in several places, with or without its table of task types; each goes through the constructor of
PeftModel, which looks the tuner up in a public table. There our `peft_type` has `PissaTunerOrToCome`. No entry of
anybody else changes, and nothing of PEFT is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from pissa.config import PissaConfig, PissaType
from pissa.model.tuner import PissaTuner, is_building
from pissa.model.wrap import wrap
from pissa.peft_private import TunerToCome


class PissaTunerOrToCome(PissaTuner):
    """What PEFT's table of tuners has: PissaTuner, except for the constructor of a PeftModel that is not ours."""

    def __new__(cls, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> Any:
        """A PissaTuner; for a PeftModel that PEFT makes, which alone gives a dictionary, what makes it ours."""
        if is_building() or not isinstance(peft_config, Mapping):
            return PissaTuner(model, peft_config, adapter_name, **kwargs)
        return _TunerToCome(model, peft_config[adapter_name])


class _TunerToCome(TunerToCome):
    """Turns the PeftModel that it is put into into the PissaModel of a model and a configuration."""

    def __init__(self, model: nn.Module, config: PissaConfig) -> None:
        super().__init__()
        self.given = (model, config)  # a tuple, so that the model is no child
        self.parents: list[nn.Module] = []
        self.hook = register_module_module_registration_hook(self._note)

    def _note(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is self:
            self.parents.append(parent)

    def start(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Wraps the model.

        Raises:
            TypeError: a subclass of PEFT's classes, which would lose what it adds.
            Exception: as `wrap`. The model is left as it was.
        """
        self.hook.remove()
        (made,) = self.parents
        if not type(made).__module__.startswith(PeftModel.__module__):
            raise TypeError(
                f"a PissaConfig makes a pissa.PissaModel, and {type(made).__name__} is a class of its own; use "
                "pissa.wrap(model, config), or one of PEFT's classes"
            )
        model, config = self.given
        ours = wrap(model, config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        made.__class__ = type(ours)
        vars(made).clear()
        vars(made).update(vars(ours))


PEFT_TYPE_TO_TUNER_MAPPING[PissaType.PISSA] = PissaTunerOrToCome

"""For programs that build a `peft.LoraConfig` themselves: pissa takes over what it can, in the whole process::

    import pissa.integrations.peft

    pissa.integrations.peft.enable()

From then on `peft.get_peft_model`, wherever a program has imported it,

- turns `LoraConfig(init_lora_weights="pissa")`, or "pissa_niter_N", into what `wrap` makes of a PissaConfig with the
  same rank, scaling, targets and so on. The base does not change, and `save_pretrained` writes the plain LoRA for it,
  so nothing has to be converted. Whatever N is, the decomposition is the default of `PissaConfig`, whose number of
  passes depends on the rank; it is at least as exact.
- turns a LoraConfig that starts as LoRA, on a model with bitsandbytes' 4-bit layers, into an adapter that computes with
  our kernels. It starts from the factors that PEFT draws, and leaves torch's generator in the same state as PEFT.

Some programs, such as TRL's scripts, do not let users choose how the adapter starts. `enable(init="pissa")` chooses it
for them.

`PeftModel.from_pretrained` returns a PissaModel for a folder that one has written. Everything else in PEFT is
unchanged: other inits, other methods, other layers. An option that pissa does not support leaves the adapter to PEFT,
with one warning if that is slower or changes the base.

This module imports little. The modules that take over an adapter are imported when the first one is made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any, Literal, get_args

from torch import nn

from pissa.ops.checks import check_choice

Notify = Callable[[str], None]
Start = Literal["pissa"]

_undo: ExitStack | None = None
"""What `disable` has to undo; None if the integration is off."""
_notify: Notify | None = None
_init: Start | None = None


def enable(notify: Notify | None = None, init: Start | None = None) -> None:
    """Turns the integration on, for all threads. Call it while no other thread calls PEFT. If it is already on, only
    the arguments are replaced.

    Args:
        notify: is called with one sentence for each adapter that is taken over.
        init: "pissa" also applies PiSSA to a LoraConfig that does not choose its start (init_lora_weights=True). If
            that fails, `get_peft_model` raises ValueError.
    """
    import_module("peft")  # first, because under `pissa run` importing it enables this module, too
    from pissa.peft_private import take_over

    check_choice("init", init, (None, *get_args(Start)))
    global _undo, _notify, _init
    _notify, _init = notify, init
    if _undo is None:
        _undo = ExitStack()
        _undo.enter_context(take_over(_make, _load))


def disable() -> None:
    """Turns it off and restores PEFT. Models that were made stay as they are. If it is already off, nothing happens."""
    global _undo
    if _undo is not None:
        _undo.close()
    _undo = None


def is_enabled() -> bool:
    """Whether the integration is on."""
    return _undo is not None


def _make(peft_class: type[nn.Module], model: nn.Module, config: Any, **kwargs: Any) -> nn.Module:
    from pissa.integrations.takeover import make

    return make(peft_class, model, config, _init, _notify, **kwargs)


def _load(plain: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    from pissa.integrations.takeover import load

    return load(plain, *args, **kwargs)

"""Programs that build a `peft.LoraConfig` themselves: pissa takes over what it can, for the process::

    import pissa.integrations.peft

    pissa.integrations.peft.enable()

From then on `peft.get_peft_model`, from wherever a program has imported it,

- makes of `LoraConfig(init_lora_weights="pissa")`, or "pissa_niter_N", what `wrap` makes of a PissaConfig with the same
  rank, scaling, targets and so on. The base stays what it is, and `save_pretrained` writes the plain LoRA for it, so
  that nothing has to be converted. Whatever N is, the decomposition is `PissaConfig`'s default, whose number of passes
  follows the rank: at least as exact.
- makes of a LoraConfig that starts as LoRA, on a model with 4-bit layers of bitsandbytes, an adapter that computes with
  our kernels. It starts from the factors that PEFT draws, and leaves torch's generator where PEFT leaves it.

Some programs let nobody say how the adapter starts: TRL's scripts. `enable(init="pissa")` says it for them.

`PeftModel.from_pretrained` gives a PissaModel for a folder that one has written. Everything else in PEFT is untouched:
other inits, other methods, other layers. An option that we do not have leaves the adapter PEFT's, with one warning if
that is slower or changes the base.

This module imports little: what is needed to take an adapter over is imported when the first one is made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any, Literal, get_args

from torch import nn

from pissa.ops.checks import check_choice

Notify = Callable[[str], None]
Batches = Callable[[str], list[Any]]
Start = Literal["pissa"]

_undo: ExitStack | None = None
"""What is to be undone; None if it is off."""
_notify: Notify | None = None
_init: Start | None = None
_batches: Batches | None = None


def enable(notify: Notify | None = None, init: Start | None = None, batches: Batches | None = None) -> None:
    """Turns it on, for all threads: call it where no other thread calls PEFT. Where it is on already, only the
    arguments are replaced.

    Args:
        notify: is called with one sentence for each adapter that is taken over.
        init: "pissa" makes PiSSA of a LoraConfig that says nothing of its start, too (init_lora_weights=True). If it
            cannot, `get_peft_model` raises ValueError.
        batches: a calibration: given the folder or the name on the Hub that a model was loaded from, batches of what it
            will read, as `pissa.calibrate` takes them. What bitsandbytes' 4 bits lose is then repaired beneath a
            LoraConfig that starts as LoRA, as by `pissa.wrap(weights=..., repair="activations")`; or `get_peft_model`
            raises what that does.
    """
    import_module("peft")  # first: under `pissa run` that enables this module, too
    from pissa.peft_private import taken_over

    check_choice("init", init, (None, *get_args(Start)))
    global _undo, _notify, _init, _batches
    _notify, _init, _batches = notify, init, batches
    if _undo is None:
        _undo = ExitStack()
        _undo.enter_context(taken_over(_made, _loaded))


def disable() -> None:
    """Turns it off: PEFT is what it was. Models that were made stay what they are. Where it is off, nothing happens."""
    global _undo
    if _undo is not None:
        _undo.close()
    _undo = None


def is_enabled() -> bool:
    """Whether it is on."""
    return _undo is not None


def _made(kind: type[nn.Module], model: nn.Module, config: Any, **kwargs: Any) -> nn.Module:
    from pissa.integrations.takeover import made

    return made(kind, model, config, _init, _notify, _batches, **kwargs)


def _loaded(plain: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    from pissa.integrations.takeover import loaded

    return loaded(plain, *args, **kwargs)

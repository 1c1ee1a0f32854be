"""Advice to trainers of reinforcement learning, which tag the models that they train."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from pissa.notices import RewardsWarning

_TAGS = frozenset({"grpo", "rloo", "gmpo"})
"""What TRL tags a model with that it trains by rewards alone."""


def starts_warned_of(model: Any, tags: Iterable[str]) -> list[str]:
    """The starts from singular components, by init method, of the model's active adapters, if the tags are those of
    reinforcement learning."""
    if not _TAGS & set(tags):
        return []
    inits = {model.peft_config[name].init for name in model.active_adapters}
    return sorted(init for init in inits if init.startswith("pissa"))


def warn_of_rewards(inits: Iterable[str], stacklevel: int) -> None:
    """Warns of such starts; `stacklevel` counts from the caller."""
    names = ", ".join(f'init="{init}"' for init in inits)
    warnings.warn(
        f"Reinforcement learning with {names}: arXiv 2512.23165 saw adapters that start from singular components, "
        "principal or minor ones, collapse when they were trained by verifiable rewards, where LoRA's start did not. "
        'Give preset="rl" instead, LoRA\'s start with rank-stabilised scaling: pissa.wrap(model, preset="rl", r=16), '
        'with quant="nf4" for a 4-bit base, and repair="pissa" with it for QPiSSA\'s.',
        RewardsWarning,
        stacklevel=stacklevel + 1,
    )

"""What is done between the steps of a training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class MoveRanks(TrainerCallback):
    """Has PEFT's AdaLoRA move ranks between layers while the gradients are there, as its documentation asks."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)

"""One loop of training and one of evaluation, for all experiments."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bench.training.tasks import Batch, Task

WARM_UP = 0.05  # of the steps
CLIP = 1.0  # transformers' default


def fit(model: nn.Module, task: Task, rate: float, seed: int) -> list[float]:
    """Trains the model and returns the loss of each step. `seed` is that of the order of the data.

    AdamW without weight decay; the rate falls by a cosine after a warm-up.
    """
    from transformers import get_cosine_schedule_with_warmup

    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * task.steps), task.steps)
    losses = []
    for _, batch in zip(range(task.steps), task.training_batches(seed), strict=False):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """The means of what the task measures, over all batches."""
    model.eval()
    sums: dict[str, tuple[float, int]] = {}
    for batch in batches:
        for name, (value, count) in task.measures(model(**batch), batch).items():
            total, number = sums.get(name, (0.0, 0))
            sums[name] = total + value, number + count
    return {name: round(total / number, 5) for name, (total, number) in sums.items()}


def trained(model: nn.Module, task: Task, rate: float, seed: int, before: dict[str, float] | None) -> dict[str, Any]:
    """Trains the model: held-out measures before and after, the losses, processor times. `before` spares an evaluation:
    it is what another cell with the same start has measured."""
    held_out, begun = task.held_out(), time.process_time()
    before = before or evaluate(model, task, held_out)
    evaluated = time.process_time()
    losses = fit(model, task, rate, seed)
    fitted = time.process_time()
    after = evaluate(model, task, held_out)
    return {
        "steps": task.steps,
        "batch": task.batch,
        **task.facts,
        "before": before,
        "after": after,
        "training_losses": [round(loss, 5) for loss in losses],
        "seconds": {"training": round(fitted - evaluated, 1), "all": round(time.process_time() - begun, 1)},
    }

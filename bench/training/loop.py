"""One loop of training and one of evaluation, for all experiments."""

from __future__ import annotations

from collections.abc import Iterable

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

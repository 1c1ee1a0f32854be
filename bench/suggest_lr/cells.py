"""The cells: a task, a method, a rank, a rate and a seed. Cells of one method and rank share a wrapped model."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pissa
from bench.training.loop import trained
from bench.training.tasks import Task
from pissa.config import Init

METHODS: tuple[Init, ...] = ("pissa", "lora")
RANKS = (4, 16, 64)
BATCHES = 30  # that a suggestion is made from

_STEPS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
_CENTRES = {
    ("pissa", 4): 1e-3,
    ("pissa", 16): 5e-4,
    ("pissa", 64): 2e-4,
    ("lora", 4): 2e-3,
    ("lora", 16): 2e-3,
    ("lora", 64): 1e-3,
}


class Cell(NamedTuple):
    """What a cell is called in the results."""

    task: str
    method: str
    rank: int
    rate: float
    seed: int


def rates(method: str, rank: int) -> list[float]:
    """Seven rates, factors of 2 to 2.5 apart, the ones in the middle first."""
    middle = _STEPS.index(_CENTRES[method, rank])
    return sorted(_STEPS[middle - 3 : middle + 4], key=lambda rate: abs(_STEPS.index(rate) - middle))


class Start:
    """A model with an adapter that can be put back to its start, so that it is split once."""

    def __init__(self, model: nn.Module, method: Init, rank: int, task_type: str) -> None:
        self.model = pissa.wrap(model, init=method, r=rank, task_type=task_type)
        self._values: list[tuple[Tensor, Tensor]] = [
            (parameter, parameter.detach().clone()) for parameter in self.model.parameters() if parameter.requires_grad
        ]

    @torch.no_grad()
    def reset(self) -> pissa.PissaModel:
        for parameter, value in self._values:
            parameter.copy_(value)
            parameter.grad = None
        return self.model


def train(task: Task, start: Start, cell: Cell, before: dict[str, float] | None = None) -> dict[str, Any]:
    """Held-out losses before and after training, and processor times.

    `before` is what another cell of the task has measured: without a quantised base all starts compute the same.
    """
    wall = time.monotonic()
    found = trained(start.reset(), task, cell.rate, cell.seed, before)
    found["seconds"]["wall"] = round(time.monotonic() - wall, 1)
    return cell._asdict() | found


def suggest(task: Task, start: Start, method: str, rank: int, seed: int) -> dict[str, Any]:
    """The rate that is suggested for a group of cells, from batches in another order than those of training."""
    model = start.reset()
    clock, begun = time.process_time, time.process_time()
    found = pissa.suggest_lr(model, islice(task.training_batches(seed + 1), BATCHES))
    return {
        "task": task.name,
        "method": method,
        "rank": rank,
        "seed": seed,
        "suggested": found.rate,
        "text": found.text,
        "batches": BATCHES,
        "losses": {f"{rate:.3e}": round(loss, 5) for rate, loss in found.losses.items()},
        "seconds": {"all": round(clock() - begun, 1)},
    }

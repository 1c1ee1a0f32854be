"""One cell of the experiment: a task, a start, a rate and a seed; what training makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.quant_iters.starts import RANK, STARTS, dense_weights, quantised, repaired, wrap
from bench.training.loop import trained
from bench.training.tasks import Task
from pissa.layers.layer import pissa_layers


class Cell(NamedTuple):
    """What a cell is called in the results."""

    task: str
    start: str
    rate: float
    seed: int


def train(task: Task, cell: Cell, before: dict[str, float] | None = None) -> dict[str, Any]:
    """Held-out losses before and after training, and processor times.

    The start does not depend on the seed, the data and a head do. `before` is what another rate has measured.
    """
    torch.manual_seed(cell.seed)
    begun = time.process_time()
    model = wrap(task.model(), STARTS[cell.start], cell.seed, task.task_type)
    start = time.process_time() - begun
    found = trained(model, task, cell.rate, cell.seed, before)
    seconds = found["seconds"]
    found["seconds"] = {"start": round(start, 1), **seconds, "all": round(start + seconds["all"], 1)}
    return cell._asdict() | {"rank": RANK} | found


def weight_errors(task: Task) -> dict[str, Any]:
    """What is left of the error of nf4(W) in each start, over all adapted layers: the Frobenius norm (of all
    together) and the nuclear norm (the sum), as shares of nf4's own."""
    model = task.model()
    dense = dense_weights(model)
    adapted = pissa_layers(wrap(model, STARTS["QLoRA"], 0, task.task_type).get_base_model())
    weights = [dense[name] for name in adapted]
    own = _norms(weights, quantised)
    found: dict[str, Any] = {"task": task.name, "errors_of": "weights", "rank": RANK, "layers": len(weights)}
    for quant_iters in (1, 5):
        norms = _norms(weights, partial(repaired, quant_iters=quant_iters))
        found[f"T = {quant_iters}"] = {norm: round(norms[norm] / own[norm], 5) for norm in own}
    return found


def _norms(weights: Iterable[torch.Tensor], approximate: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    squares, nuclear = 0.0, 0.0
    for weight in weights:
        values = torch.linalg.svdvals(weight.float() - approximate(weight))
        squares += values.double().square().sum().item()
        nuclear += values.double().sum().item()
    return {"frobenius": squares**0.5, "nuclear": nuclear}

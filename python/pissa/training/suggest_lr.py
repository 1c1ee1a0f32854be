"""suggest_lr: finds a learning rate for a model with trial trainings of a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pissa.base.classes import evaluation_mode
from pissa.distributed import agree, failing_together, is_sharded

CLIP = 1.0  # the default of transformers.Trainer; Adam's rate depends on it while gradients change
MOST_TRIALS = 16


class Suggestion(NamedTuple):
    """The result of `suggest_lr`."""

    rate: float
    """The peak of a cosine schedule for Adam, with two significant digits."""
    text: str
    """The rate, and the measurements behind it, in one line."""
    losses: dict[float, float]
    """The final loss of each trial, by its rate; inf if the trial diverged."""


def suggest_lr(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Suggestion:
    """Finds the learning rate at which a miniature training works best::

        model = pissa.wrap(model, r=16)
        suggestion = pissa.suggest_lr(model, itertools.islice(dataloader, 30))
        print(suggestion.text)
        arguments = SFTConfig(learning_rate=suggestion.rate, lr_scheduler_type="cosine")

    A trial trains on the first half of the batches: Adam, gradients clipped at norm 1, a cosine from the rate to 0. The
    rate is judged by the loss on the second half, which the trial has not seen. Rates are factors of two apart. They
    start at `2 L / |g|_1` (the best step along sign(g), Adam's first, if the loss is a parabola that ends at 0) and
    continue until the best one is between two others. The suggestion is the vertex of a parabola through these three,
    over the logarithm of the rate.

    The cost is a forward and backward pass, plus one for each batch in each trial, half of them without backward. There
    are at least three trials, usually four. The memory is a copy of the trained parameters, plus Adam's. Afterwards the
    model is as before, bit for bit, with its gradients, modes, running statistics and torch's generators. The same
    input gives the same rate.

    With several processes, all of them must call this function, each with its own batches. All get the same rate.

    Args:
        model: the model; its parameters with `requires_grad` are trained.
        batches: batches as in the training. With the default `loss`, mappings of keyword arguments with labels, on the
            model's device. At least 2. More batches bring the trial closer to the training and cost more; it was
            measured with 30.
        loss: the loss of a batch, a scalar with a gradient (default: `model(**batch).loss`).

    Raises:
        ValueError: there are fewer than two batches; nothing is trained; the model is sharded; the loss is NaN or
            infinite before any training, or does not depend on what is trained; no rate is better than both half and
            twice of it.
        TypeError: a batch is not a mapping, and `loss` is not given.
        pissa.RankError: another process has failed.
    """
    with failing_together():
        trial = _Trial(model, list(batches), loss or own_loss)
        with _restore_afterwards(model, trial):
            losses = _bracket(trial, 2 * trial.unit_step())
    rate = float(f"{_vertex(losses):.1e}")
    tried = ", ".join(f"{_format_loss(losses[rate])} at {rate:.1e}" for rate in sorted(losses))
    text = (
        f"learning rate {rate:.1e}: {len(losses)} trial trainings of {len(trial.seen)} steps left losses of {tried} on "
        f"{len(trial.unseen)} other batches"
    )
    return Suggestion(rate, text, losses)


class _Trial:
    """Miniature trainings, each starting from the model as it was given."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(
                "nothing is trained: no parameter of the model has requires_grad; wrap it with pissa.wrap, or load the "
                "adapter with is_trainable=True [P040]"
            )
        if sharded := [name for name, parameter in trained.items() if is_sharded(parameter)]:
            raise ValueError(f"the model is sharded ({sharded[0]}): call suggest_lr before it is [P044]")
        if len(batches) < 2:
            raise ValueError(
                f"batches: got {len(batches)}; needed: at least 2, because a rate is judged by batches on which it "
                "was not trained [P042]"
            )
        self.parameters = list(trained.values())
        self.devices = sorted({parameter.device.index for parameter in self.parameters if parameter.is_cuda})
        # A forward pass in training mode also changes running statistics and the generators.
        tracking = (module for module in model.modules() if getattr(module, "track_running_stats", False))
        statistics = [buffer for module in tracking for buffer in module.buffers(recurse=False)]
        self._start = [(tensor, tensor.detach().clone()) for tensor in (*self.parameters, *statistics)]
        self._model = model
        self._loss = loss
        half = len(batches) // 2
        self.seen, self.unseen = batches[:half], batches[half:]

    def unit_step(self) -> float:
        """L / |g|_1 of the first batch: the step along sign(g) at which the slope would bring the loss to 0."""
        self.reset()
        self._model.train()
        loss = self._loss(self._model, self.seen[0])
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of the first batch is {loss.item()} before training; needed: finite [P041]")
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on what is trained: it has no gradient [P040]")
        torch.autograd.backward(loss)
        slope: float = get_total_norm([p.grad for p in self.parameters if p.grad is not None], 1.0).item()
        if not 0 < slope < math.inf:
            raise ValueError(f"the gradient of the first batch has norm {slope}; needed: a positive, finite one [P041]")
        return float(mean(agree((abs(loss.item()) or 1.0) / slope)))

    def __call__(self, rate: float) -> float:
        """The mean loss on the unseen batches after a training at that rate; inf if it diverged."""
        self.reset()
        optimizer = torch.optim.Adam(self.parameters, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(self.seen))
        self._model.train()
        for batch in self.seen:
            torch.autograd.backward(self._loss(self._model, batch))
            clip_grad_norm_(self.parameters, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with evaluation_mode(self._model), torch.no_grad():
            left = mean(self._loss(self._model, batch).item() for batch in self.unseen)
        left = float(mean(agree(left)))
        return left if math.isfinite(left) else math.inf

    @torch.no_grad()
    def reset(self) -> None:
        """Restores the model's initial state, without gradients, and gives its generators a fixed seed."""
        for tensor, value in self._start:
            tensor.copy_(value)
            tensor.grad = None
        torch.default_generator.manual_seed(0)
        for device in self.devices:
            torch.cuda.default_generators[device].manual_seed(0)


def _bracket(trial: Callable[[float], float], first: float) -> dict[float, float]:
    """Losses by rate, factors of two apart. The lowest loss is not at an end."""
    losses = {first: trial(first)}
    while len(losses) < MOST_TRIALS:
        best = min(losses, key=lambda rate: (losses[rate], rate))  # if all diverged, continue with smaller rates
        if best == min(losses):
            losses[best / 2] = trial(best / 2)
        elif best == max(losses):
            losses[2 * best] = trial(2 * best)
        else:
            return losses
    least, most = min(losses), max(losses)
    raise ValueError(
        f"no rate from {least:.1e} to {most:.1e} is better than half and twice of it: the loss is "
        f"{_format_loss(losses[least])} at one end, {_format_loss(losses[most])} at the other; give more batches [P043]"
    )


def _vertex(losses: Mapping[float, float]) -> float:
    """The vertex of the parabola through the best rate and its neighbours, over the logarithm of the rate."""
    best = min(losses, key=lambda rate: (losses[rate], rate))
    below, above = losses[best / 2] - losses[best], losses[2 * best] - losses[best]
    if not math.isfinite(below + above) or below + above == 0:
        return best
    return best * 2 ** ((below - above) / (2 * (below + above)))


def _format_loss(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "no number"


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model computes for a batch, a mapping of its keyword arguments."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches: got one of type {type(batch).__name__}; allowed: mappings of keyword arguments of the model, or "
            "give loss=, a function of model and batch [P042]"
        )
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ValueError("the model gives no loss for the first batch; give batches with labels, or loss= [P042]")
    return loss


@contextmanager
def _restore_afterwards(model: nn.Module, trial: _Trial) -> Iterator[None]:
    """Restores the model and the generators after the block."""
    gradients = [parameter.grad for parameter in trial.parameters]
    with torch.random.fork_rng(trial.devices), evaluation_mode(model):
        try:
            yield
        finally:
            trial.reset()
            for parameter, gradient in zip(trial.parameters, gradients, strict=True):
                parameter.grad = gradient

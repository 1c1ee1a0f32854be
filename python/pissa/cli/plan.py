"""What a training will take, before its first step: steps, time and memory, measured with a batch that is trained on
and forgotten."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn

from pissa.checkpoints.training_memory import training_memory
from pissa.cli.data import IGNORED
from pissa.cli.memory import free_memory, peak_memory
from pissa.cli.terminal import as_duration, as_size, count_of
from pissa.layers.layer import pissa_layers

_LOOKED_AT = 4096
"""The rows whose lengths are looked at."""

_COUNTED = 64
"""The batches whose padding is counted."""

_GAPS = 0.25
"""What batches of many lengths leave unused between their activations, as a share of those of the longest batch:
SmolLM2-135M, 60 steps of GSM8K, grew by 0.6 GiB, and 2.2 GiB are activations."""

_ADAM = 8
"""Bytes of AdamW's two averages for each trained element, which exist from the first step on."""


class TrainingPlan(NamedTuple):
    """What a training will take."""

    steps: int
    """The optimiser steps that are left."""
    examples: int
    """Examples in a step, on all processes together."""
    passes: float
    """How often the steps see each example."""
    padding: float
    """The share of padding in the batches."""
    a_step: float
    """The seconds of a step."""
    besides: float
    """The seconds of all evaluations, and of what else is not a step."""
    memory: int
    """The peak memory of this process, in bytes."""
    empty: float = 0.0
    """The share of the batches in which no token is learned."""

    @property
    def seconds(self) -> float:
        return self.steps * self.a_step + self.besides

    def text(self, device: torch.device) -> str:
        """The plan in one line."""
        where = count_of(torch.get_num_threads(), "thread") if device.type == "cpu" else str(device)
        return (
            f"{count_of(self.steps, 'step')} of {self.examples} examples ({self.passes:.2g} x the data, "
            f"{self.padding:.0%} padding): about {as_duration(self.seconds)} on {where}, {as_size(self.memory)}"
        )

    def within(self, minutes: float) -> TrainingPlan:
        """The plan with as many steps as fit into these minutes, at least one, and not more than now."""
        steps = max(1, min(self.steps, int((60 * minutes - self.besides) / self.a_step)))
        return self._replace(steps=steps, passes=self.passes * steps / self.steps)

    def notes(self, free: int) -> Iterator[str]:
        """Yields what to change, where that is advisable. `free` is how many more bytes the process can get."""
        if self.seconds > 86_400:
            yield "that is more than a day. Fewer --steps, a smaller --max-length or model take less time [P098]"
        if self.memory > peak_memory() + free:
            how = "--gradient-checkpointing, a smaller --batch-size or --max-length, or --quant nf4 take less"
            yield f"only {as_size(free)} of memory are free. {how} [P098]"
        if self.empty:
            why = "the answers are cut away, or have no labels. A larger --max-length keeps more of them"
            yield f"{self.empty:.0%} of the batches have no token to learn, and teach nothing: {why} [P097]"


# ---- Memory, by the model's shapes -----------------------------------------------------------------------------------


def needs_checkpointing(args: Any, model: Any, rows: Any) -> bool:
    """Whether the activations of the longest batch would fill more than half of the free memory, so that blocks should
    rather compute theirs again. False on a GPU, for several processes, and for a model without layers of ours, of which
    nothing is known.

    Args:
        args: the trainer's.
        model: a PeftModel.
        rows: the training data. Rows without tokens yet may become as long as allowed.
    """
    base = model.base_model.model
    layers = {name: layer.matrix_shape for name, layer in pissa_layers(base).items()}
    if not layers or args.world_size > 1 or args.device.type != "cpu":
        return False
    is_encoded = isinstance(rows, Dataset) and "input_ids" in rows.column_names
    longest = max(map(len, rows["input_ids"])) if is_encoded else args.max_length or 0
    hidden, tokens = base.config.get_text_config().hidden_size, args.train_batch_size * longest
    memory = training_memory(layers, 1, weights=0, dtype=base.dtype, hidden=hidden, tokens=tokens)
    return memory["plain"]["activations"] > free_memory() / 2


# ---- Time, by one batch ----------------------------------------------------------------------------------------------


def make_plan(trainer: Any, loss: Callable[[nn.Module, Any], Tensor], done: int = 0) -> TrainingPlan | None:
    """Measures what a training by a TRL trainer will take.

    The longest examples make one batch, on which the model is trained without a step of the optimiser. So what runs out
    of memory does so now. Its time is that of as many tokens in the whole training.

    Args:
        trainer: the trainer, before `train`. Its model has no gradients afterwards.
        loss: computes the loss of the model for a batch.
        done: the steps that a resumed run has made already.

    Returns:
        The plan; None if the data have no known length, or if the model is spread over several processes.
    """
    args, rows = trainer.args, trainer.train_dataset
    if not isinstance(rows, Dataset) or args.world_size > 1:
        return None
    examples = args.train_batch_size * args.gradient_accumulation_steps
    a_pass = max(1, math.ceil(len(rows) / args.train_batch_size / args.gradient_accumulation_steps))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * a_pass)
    steps = max(total - done, 0)

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    sizes = {index: _size(rows[index]) for index in order[:_LOOKED_AT]}
    longest = sorted(sizes, key=lambda index: -sizes[index])

    def batch(indices: Sequence[int]) -> dict[str, Any]:
        return collate(trainer, [rows[index] for index in indices])

    size = args.train_batch_size
    starts = range(0, min(len(order), _COUNTED * size), size)
    counts = [_count(batch(order[start : start + size])) for start in starts]
    places, tokens, learned = zip(*counts, strict=True)
    empty = learned.count(0) / len(learned)

    _try(trainer, loss, batch(longest[-1:]))  # the first backward is slower
    trial = batch(longest[:size])
    peak, now = peak_memory(), psutil.Process().memory_info().rss
    seconds = _try(trainer, loss, trial)
    memory = peak_memory()
    if memory > peak:
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        memory += _ADAM * trained + int(_GAPS * (memory - now))
    # The backward pass takes as long as the forward pass, which checkpointing repeats; but on a CPU it skips padding.
    forward = 2 / 3 if args.gradient_checkpointing else 1 / 2

    def work(places: int, tokens: int) -> float:
        return forward * places + (1 - forward) * tokens

    # Seconds of an example: one that is trained on, and one that is evaluated.
    counted = sum(min(size, len(order) - start) for start in starts)
    a_unit = seconds / work(*_count(trial)[:2]) / counted
    trained, evaluated = a_unit * work(sum(places), sum(tokens)), a_unit * (1 - forward) * sum(places)
    passes, padding = steps * examples / len(rows), 1 - sum(tokens) / sum(places)
    besides = len(trainer.eval_dataset or ()) * evaluations(args, steps) * evaluated
    a_step = min(examples, len(rows)) * trained
    return TrainingPlan(steps, examples, passes, padding, a_step, besides, memory, empty)


def collate(trainer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of these rows, as the trainer collates it, on the model's device."""
    batch: dict[str, Any] = send_to_device(trainer.data_collator(list(rows)), trainer.model.device)
    return batch


def _size(row: Mapping[str, Any]) -> int:
    """The length of a row's sequences of tokens, as far as there are any before the collator."""
    return sum(len(value) for value in row.values() if isinstance(value, list))


def _count(batch: Mapping[str, Any]) -> tuple[int, int, int]:
    """The places of a batch, the tokens in them that are not padding, and those that are learned."""
    places: int = batch["input_ids"].numel()
    tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else places
    return places, tokens, int((batch["labels"] != IGNORED).sum()) if "labels" in batch else tokens


def evaluations(args: Any, steps: int) -> float:
    """How often the held-out data are evaluated: before, during and after training."""
    if args.eval_strategy != "steps" or not args.eval_steps:
        return 2
    between: float = args.eval_steps
    return 1 + (steps / between if between >= 1 else 1 / between)


def _try(trainer: Any, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> float:
    """The seconds of a forward and a backward pass as in the training. The model and the generators are as before."""
    began, model = time.perf_counter(), trainer.model
    if trainer.args.gradient_checkpointing:
        # transformers renames the method; `train` calls it again, with the user's options.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return time.perf_counter() - began

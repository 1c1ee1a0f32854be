"""The cost of a training step: memory, and seconds on this machine, measured on one block of each kind."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pissa.checkpoints.load import load
from pissa.config import Form, PissaConfig, exactly
from pissa.containers.messages import first_line
from pissa.containers.model_folder import meta_model
from pissa.model.blocks import blocks_of
from pissa.ops.formats import FORMATS
from pissa.training.fused_head import fuse_head
from pissa.training.fused_layers import fuse_layers


def training_memory(
    layers: Mapping[str, tuple[int, int]],
    r: int,
    *,
    weights: int,
    dtype: torch.dtype,
    hidden: int,
    tokens: int,
) -> dict[str, dict[str, int]]:
    """Returns the bytes of a training step by their use, and their total, without the memory of Python and torch
    themselves: "plain", and with gradient "checkpointing".

    Activations are an estimate: for each token, an adapted layer keeps its input and its output. With gradient
    checkpointing, each block keeps only its input, and one block at a time keeps the rest. Logits are not counted,
    because `fuse_head` does without them. Nor is what attention stores for each pair of tokens, because the usual
    implementations do not store it. Every expert of a mixture counts as if it saw every token, which is an upper bound.

    Args:
        layers: the shapes [out, in] of the adapted weights, by the layers' names.
        r: the rank of the adapter; a layer with a smaller side has that side as its rank.
        weights: bytes of the model, including tensors that are not adapted.
        dtype: dtype of the activations between layers.
        hidden: elements that a block passes on for each token.
    """
    factors = 4 * sum(min(r, *shape) * sum(shape) for shape in layers.values())  # float32
    blocks = Counter[str]()
    for name, shape in layers.items():
        blocks[re.sub(r"(?<![^.])(\d+)\..*", r"\1", name)] += sum(shape) * dtype.itemsize  # up to the first number
    of_a_token = {
        "plain": blocks.total(),
        "checkpointing": len(blocks) * hidden * dtype.itemsize + max(blocks.values()),
    }
    stored = {
        "weights": weights,
        "start": factors,  # A0 and B0
        "trained": factors,  # dA and dB
        "gradients": factors,
        "optimizer": 2 * factors,  # AdamW's two averages
    }
    found = {kind: stored | {"activations": tokens * count} for kind, count in of_a_token.items()}
    return {kind: parts | {"total": sum(parts.values())} for kind, parts in found.items()}


def quantised_bytes(shape: tuple[int, int], form: Form) -> int:
    """The bytes of a weight in codes."""
    format = FORMATS[form.kind]
    tensors = format.tensors(shape, *format.options(form.blocksize, form.double_quant, shape[1]))
    return sum(math.prod(size) * kept.itemsize for size, kept in tensors.values())


# ---- Seconds ---------------------------------------------------------------------------------------------------------

_REPEATS = 3
_RUNS = 8  # runs of a block in a pass, if there are as many like it: its seconds are a difference
_NOT_MEASURED = "not measured"


def step_seconds(
    folder: Path,
    layers: Mapping[str, tuple[int, int]],
    r: int,
    *,
    quant: str | None,
    batch: int,
    length: int,
) -> dict[str, Any]:
    """Measures the seconds of a training step of a causal language model on this machine, as `pissa finetune` runs it,
    without the optimizer: "plain", and with gradient "checkpointing". Only one block of each kind is given an adapter
    and run, between embeddings and loss; the others are assumed to be the same. "blocks" contains each kind's first
    block, how many there are, and the seconds of its forward and backward. "rest" contains those of the model without
    blocks. If this fails, "not measured" contains the reason.

    Args:
        layers: the shapes [out, in] of the adapted weights, by the layers' names.
        r: the rank of the adapter; a layer with a smaller side has that side as its rank.
        quant: as for `pissa.wrap`.
        batch, length: sequences in a step, and tokens in a sequence; the tokens are random.
    """
    numbered = [name for name in layers if re.search(r"\.\d+\.", name)]
    kinds = _kinds(blocks_of(meta_model(folder), numbered), numbered, layers) if numbered else []
    if not kinds:
        return {_NOT_MEASURED: "the layers are not in blocks, one after the other in one list"}
    chosen = {name: shape for name, shape in layers.items() if any(name.startswith(f"{one[0]}.") for one in kinds)}
    config = PissaConfig(
        r=r,
        init="lora",
        quant=quant,
        target_modules=list(chosen),
        rank_pattern={exactly(name): min(shape) for name, shape in chosen.items() if min(shape) < r},
    )
    try:
        model: Any = load(folder, config).train()
        fuse_layers(model)
        with suppress(TypeError, ValueError):  # where it needs logits
            fuse_head(model)
        model.enable_input_require_grads()  # as if earlier blocks had adapters
        tokens = torch.randint(model.config.get_text_config().vocab_size, (batch, length))
        every = [model.base_model.model.get_submodule(name) for kind in kinds for name in kind]
        rest = _seconds(model, tokens, every)
        found: list[dict[str, Any]] = []
        for first, *others in kinds:
            block, *more = (model.base_model.model.get_submodule(name) for name in (first, *others[: _RUNS - 1]))
            both = _seconds(model, tokens, [one for one in every if one not in (block, *more)], (block, more))
            forward, backward = (
                max(0.0, whole - less) / (1 + len(more)) for whole, less in zip(both, rest, strict=True)
            )
            found.append({"block": first, "count": 1 + len(others), "forward": forward, "backward": backward})
    except Exception as error:  # a model that is not run as intended may raise anything
        return {_NOT_MEASURED: f"{type(error).__name__}: {first_line(error)}"}
    forward = sum(one["count"] * one["forward"] for one in found)
    plain = sum(rest) + forward + sum(one["count"] * one["backward"] for one in found)
    return {
        "plain": plain,
        "checkpointing": plain + forward,
        "blocks": found,
        "rest": dict(zip(("forward", "backward"), rest, strict=True)),
        "threads": torch.get_num_threads(),
    }


def _kinds(blocks: Sequence[str], names: Sequence[str], layers: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """The blocks with adapted layers of the same names and shapes. `names` are those of the layers in blocks."""
    found = defaultdict[Any, list[str]](list)
    for block in blocks:
        here = [name for name in names if name.startswith(f"{block}.")]
        inside = tuple((name.removeprefix(block), layers[name]) for name in here)
        if inside:
            found[inside].append(block)
    return list(found.values())


def _seconds(
    model: nn.Module, tokens: torch.Tensor, skipped: Sequence[Any], repeated: tuple[Any, Sequence[Any]] = (None, ())
) -> tuple[float, float]:
    """The median seconds of a forward and a backward pass in which some blocks only pass on their input, and one block
    also runs in place of others."""
    for block in skipped:
        block.forward = lambda hidden, *_, **__: hidden
    one, others = repeated
    for block in others:
        block.forward = one.forward
    found = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        between = time.perf_counter()
        loss.backward()
        found.append((between - start, time.perf_counter() - between))
    for block in (*skipped, *others):
        del block.forward
    forward, backward = zip(*found[1:], strict=True)
    return statistics.median(forward), statistics.median(backward)

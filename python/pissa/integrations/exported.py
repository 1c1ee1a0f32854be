"""The report of every export, and the plain LoRA that two of them write."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

import torch

from pissa.adapters.lora_folder import LoraFolder
from pissa.adapters.peft_layout import PREFIX
from pissa.checkpoints.merge_codes import Kept
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.hub import Name
from pissa.containers.messages import quote
from pissa.conversion.plain_lora import PlainLora

MERGE = "`pissa merge ADAPTER OUT --base BASE`"
"""What an adapter that a runtime does not take becomes instead: a checkpoint with all of it in the weights."""


class Exported(NamedTuple):
    """The result of an export."""

    what: str
    """The kind of the adapter, in words."""
    layers: int
    """The number of layers whose weights the adapter changes."""
    written: str
    """A description of what has been written."""
    bytes_written: int
    """The total size of all files."""
    load: str
    """How to load the result, as a line of Python or shell."""
    error: float = 0.0
    """‖W - W'‖ / ‖W'‖ over the layers whose weight W differs by more than float32 rounding from the trained one, W'."""
    kept: Kept | None = None
    """What became of the change, if it is merged into the codes of the base."""
    kept_of_layers: Mapping[str, Kept] = MappingProxyType({})
    """The same for each layer, or all experts of a weight."""


def no_base(folder: LoraFolder) -> ValueError:
    """The error for an adapter that does not name the model that it was trained on."""
    return ValueError(f"{folder.path} names no base model (base_model_name_or_path): give it (base)")


def read_factors(folder: LoraFolder, base: Name | None, runtime: str) -> PlainLora:
    """Reads the adapter as a plain LoRA for a runtime that takes only factors of layers from an adapter. Raises
    ValueError for an adapter that contains more. The base is read only if it does."""
    lora = PlainLora.of(folder, base)
    base = base or folder.named_base
    fields = ("use_dora", "modules_to_save", "trainable_token_indices", "bias", "lora_bias")
    if unsupported := {name: value for name in fields if (value := folder.config.get(name)) and value != "none"}:
        text = ", ".join(f"{name}={quote(value)}" for name, value in unsupported.items())
        raise ValueError(
            f"{folder.path} has {text}: {runtime} takes nothing from an adapter but factors of layers. "
            f"Run {MERGE}, which has them in the weights, and serve that [P120]"
        )
    unchanged = set[str]() if base is None or not folder.other_keys else _unchanged(folder, base)
    for key in folder.other_keys:
        if key not in unchanged:
            hint = "If it is the base's own, give that (base). Otherwise, run" if base is None else "Run"
            raise ValueError(
                f"{folder.weights.path}: tensor {quote(key)} is not a factor of a layer, and {runtime} takes only "
                f"those from an adapter. {hint} {MERGE}, which has it in the weights, and serve that [P120]"
            )
    return lora


def _unchanged(folder: LoraFolder, base: Name) -> set[str]:
    """The tensors other than factors that equal the base's, as PEFT saves those of embeddings."""
    source, unchanged = Checkpoint.open(base), set()
    for key in folder.other_keys:
        with suppress(ValueError):
            weight = source.matrix(source.parts_of(key.removeprefix(PREFIX).replace(".base_layer.", ".")))
            saved = folder.weights.read(key)
            if saved.shape == weight.shape and torch.equal(saved, weight.to(saved.dtype)):
                unchanged.add(key)
    return unchanged

"""An adapter as a plain LoRA for a runtime that takes factors of layers, and nothing else, from an adapter."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from pissa.checkpoints.merge_plan import Planner
from pissa.conversion.lora_start import residual_of
from pissa.conversion.source import INITIAL, PEFT
from pissa.conversion.source import Source as Foreign
from pissa.files.hub import checkpoint_folder
from pissa.files.lora_folder import LoraFolder
from pissa.files.messages import shown
from pissa.files.model_folder import matrix_of
from pissa.files.peft_layout import PREFIX, Matrices
from pissa.files.source import Source
from pissa.ops.low_rank import pad_rank

Name = str | os.PathLike[str]


class PlainLora(NamedTuple):
    """What the adapter is to the unmodified base, s b a in each layer."""

    folder: LoraFolder
    what: str
    """What it is, in words."""
    found: Foreign

    @staticmethod
    def read(adapter: Path, base: Name | None, initial: Name | None, runtime: str) -> PlainLora:
        """Reads the folder.

        Args:
            base: the model, a folder or a name on the Hub; None if it is not known. It is looked at only if the adapter
                cannot be read without it.
            initial: of an adapter on a residual; see `pissa.convert`.
            runtime: its name, for messages.

        Raises:
            ValueError: an adapter that cannot be read, or that has more than factors of layers.
        """
        folder = LoraFolder.read(adapter)
        init = folder.config["init_lora_weights"]
        is_peft_pissa = isinstance(init, str) and init.startswith("pissa") and residual_of(folder) is None
        found = Foreign.read(adapter, base if is_peft_pissa and initial is None else None, initial, None)
        _check_factors_only(folder, base, runtime)
        return PlainLora(folder, found.layout, found)

    def matrices(self, target: str) -> list[Matrices]:
        """Factors a [k, in] and b [out, k] of a target, of each expert, float64."""
        return [delta.factors() for delta in self.found.deltas(target)]

    def rank(self, target: str) -> int:
        """The largest rank k that they may have."""
        return self.folder.factors[target].rank * (2 if self.found.layout in (INITIAL, PEFT) else 1)

    @property
    def layers(self) -> int:
        """The number of layers that it changes."""
        return sum(len(factors.layers) for factors in self.folder.factors.values())

    @property
    def scaling(self) -> float:
        """The scaling of the first target that has one, which is usually that of all."""
        return next((factors.scaling for factors in self.folder.factors.values() if factors.scaling), 1.0)


def _check_factors_only(folder: LoraFolder, base: Name | None, runtime: str) -> None:
    config, adapter = folder.config, folder.config_path.parent
    extra = {
        "use_dora": config["use_dora"],
        "modules_to_save": config.get("modules_to_save"),
        "trainable_token_indices": config.get("trainable_token_indices"),
        "bias": None if config.get("bias", "none") == "none" else config["bias"],
        "lora_bias": config.get("lora_bias"),
    }
    if given := {name: value for name, value in extra.items() if value}:
        text = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
        raise ValueError(
            f"{adapter} has {text}: {runtime} takes nothing from an adapter but factors of layers. Export to merged, "
            "which has them in the weights, and serve that"
        )
    if not folder.other_keys:
        return
    own = set[str]() if base is None else _unchanged(folder, checkpoint_folder(base))
    for key in folder.other_keys:
        if key not in own:
            hint = "if it is the base's own, give that (base); else e" if base is None else "E"
            raise ValueError(
                f"{folder.weights.path}: tensor {shown(key)} is no factor of a layer, the only thing that {runtime} "
                f"takes from an adapter. {hint}xport to merged, which has it in the weights, and serve that"
            )


def _unchanged(folder: LoraFolder, base: Path) -> set[str]:
    """The tensors beside the factors that are the base's, as PEFT saves those of embeddings."""
    found = set()
    with Source.open(base) as source:
        planner = Planner(source, folder)
        for key in folder.other_keys:
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            with suppress(ValueError):
                kept, parts = folder.weights.read(key), planner.parts_of(name)
                weight = matrix_of(parts, source)
                if kept.shape == weight.shape and torch.equal(kept, weight.to(kept.dtype)):
                    found.add(key)
    return found


def padded(pair: Matrices, rank: int, grow: float) -> Matrices:
    """A pair of that rank, filled up with zeros, with the product b a times `grow`."""
    a, b = pair
    return pad_rank(a, b if grow == 1 else grow * b, rank)

"""An adapter as a plain LoRA for a runtime that takes factors of layers, and nothing else, from an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from pissa.conversion.lora_start import residual_of
from pissa.conversion.source import INITIAL, PEFT
from pissa.conversion.source import Source as Foreign
from pissa.files.composition import Composition
from pissa.files.lora_folder import LoraFolder
from pissa.files.messages import shown
from pissa.files.model_folder import matrix_of, meta_model
from pissa.files.peft_layout import Matrices, base_weight_key
from pissa.files.source import Source


class PlainLora(NamedTuple):
    """What the adapter is to the unmodified base, s b a in each layer."""

    folder: LoraFolder
    what: str
    """What it is, in words."""
    found: Foreign

    @staticmethod
    def read(adapter: Path, base: Path | None, initial: str | os.PathLike[str] | None, runtime: str) -> PlainLora:
        """Reads the folder.

        Args:
            base: the model's; None if it is not known.
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
        """The scaling of the first target, which is usually that of all."""
        return next(iter(self.folder.factors.values())).scaling


def _check_factors_only(folder: LoraFolder, base: Path | None, runtime: str) -> None:
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
    own = {base_weight_key(target) for target in folder.factors}
    for key in folder.other_keys:
        if key not in own or not _is_in_base(key, folder, base):
            raise ValueError(
                f"{folder.weights.path}: tensor {shown(key)} is no factor of a layer, the only thing that {runtime} "
                "takes from an adapter"
                + ("; if it is the base's own, give that, base=" if base is None and key in own else "")
                + ". Export to merged, which has it in the weights, and serve that"
            )


def _is_in_base(key: str, folder: LoraFolder, base: Path | None) -> bool:
    """Whether an adapted layer's own weight, which PEFT saves of embeddings, is the base's."""
    if base is None:
        return False
    target = next(target for target in folder.factors if base_weight_key(target) == key)
    with Source.open(base) as source:
        parts = Composition(meta_model(source.folder), source.names).matrix(f"{target}.weight", transposed=False)
        found = matrix_of(parts, source)
        own = folder.weights.read(key)
        return own.shape == found.shape and torch.equal(own, found.to(own.dtype))


def padded(pair: Matrices, rank: int, grow: float) -> Matrices:
    """A pair of that rank, filled up with zeros, with the product b a times `grow`."""
    a, b = pair
    missing = rank - len(a)
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b if grow == 1 else grow * b, (0, missing))

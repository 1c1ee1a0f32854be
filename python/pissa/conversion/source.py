"""What an adapter's folder is: whose layout it has, and which weight its factors change."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pissa.conversion.base_model import BaseModel
from pissa.conversion.delta_weight import DeltaWeight
from pissa.conversion.lora_start import (
    BaseStarts,
    Starts,
    check_sum,
    initial_folder,
    residual_of,
    start_from_initial,
)
from pissa.files.lora_folder import LoraFolder
from pissa.files.messages import shown
from pissa.files.model_folder import quantised_kind
from pissa.files.peft_layout import base_weight_key
from pissa.files.pissa_layout import PISSA_RECORD
from pissa.files.plain_lora import warn_of_inexact_lora
from pissa.files.record import AdapterRecord, LayerRecord
from pissa.notices import InexactLoraWarning

Base = nn.Module | str | os.PathLike[str] | None

OURS = "an adapter of pissa"
INITIAL = "an adapter on a residual, and its initial adapter"
PEFT = "PEFT's PiSSA, its start computed from the base"
SUBTRACTED = "[B, -B0]·[A ; A0]"
PLAIN = "a plain LoRA"

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""The values of PEFT's init_lora_weights that leave the base as it is."""


@dataclass(frozen=True)
class Source:
    """An adapter that is to be converted."""

    folder: LoraFolder
    layout: str
    """One of the constants above."""
    starts: Starts
    """The start factors that its factors have to be compared with."""

    @staticmethod
    def read(
        path: Path,
        base: Base,
        initial: str | os.PathLike[str] | None,
        subtracted: bool | None,
    ) -> Source:
        """Reads the folder; the arguments are those of `convert`.

        Raises:
            ValueError: a layout that cannot be converted, or arguments that do not fit it.
        """
        folder = LoraFolder.read(path)
        return Source(folder, *_layout(path, folder, base, initial, subtracted))

    def deltas(self, target: str) -> list[DeltaWeight]:
        """The delta weights of a target, more than one if they are experts'."""
        scaling = self.folder.factors[target].scaling
        make = DeltaWeight.subtracted if self.layout == SUBTRACTED else DeltaWeight
        deltas = [make(scaling, *pair) for pair in self.folder.matrices(target)]
        if (starts := self.starts.of(target)) is not None:
            pairs = zip(deltas, starts, strict=True)
            deltas = [delta._replace(start=(a0.double(), b0.double())) for delta, (a0, b0) in pairs]
        return deltas

    def own_weight(self, target: str, deltas: Sequence[DeltaWeight]) -> Tensor:
        """The own weight of an adapted layer, which is in the files, for the unmodified base: W - s B0 A0 becomes W."""
        name = base_weight_key(target)
        weight, start = self.folder.weights.read(name), deltas[0].start
        if start is None or self.layout == SUBTRACTED:
            return weight
        a0, b0 = start
        product = deltas[0].scaling * (b0 @ a0)
        if self.folder.factors[target].is_embedding:
            product = product.mT
        if product.numel() != weight.numel():
            raise ValueError(
                f"{self.folder.weights.path}: tensor {shown(name)} is {list(weight.shape)}, unlike its factors"
            )
        return (weight.double() + product.reshape(weight.shape)).to(weight.dtype).contiguous()

    def base_name(self, base: Base) -> str | None:
        """The name of the unmodified base, if it is known; a residual model's is not it."""
        if residual_of(self.folder) is None and (name := self.folder.config["base_model_name_or_path"]):
            return str(name)
        if base is None or isinstance(base, nn.Module):
            return getattr(base, "name_or_path", None) or None
        return str(base)


def _layout(
    source: Path,
    folder: LoraFolder,
    base: Base,
    initial: str | os.PathLike[str] | None,
    subtracted: bool | None,
) -> tuple[str, Starts]:
    init = folder.config["init_lora_weights"]
    if (source / PISSA_RECORD).is_file():
        check_unused(f"{source} is an adapter of pissa", base=base, initial=initial, subtracted=subtracted)
        records = AdapterRecord.read(source / PISSA_RECORD).layers
        check_described(folder, records)
        forms = {layer.form.kind for layer in records.values()} - {"implicit"}
        if forms:
            warn_of_inexact_lora(forms, stacklevel=4)
        return OURS, Starts()
    if initial is None:
        initial = residual_of(folder)
    if initial is not None:
        check_unused(f"{source} is trained on a residual", subtracted=subtracted)
        return INITIAL, _start_from_initial(folder, initial, base)
    if isinstance(init, str) and init.startswith("pissa"):
        check_unused(f"{folder.config_path} has init_lora_weights {init!r}", subtracted=subtracted)
        _check_no_parameters(folder)
        if init != "pissa":
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is {init!r}, a random decomposition that PEFT does not seed, "
                "so its start cannot be computed again. Give the adapter as it was saved before training (initial). "
                "Without it the adapter can only be used with the residual model that it was trained on"
            )
        if base is None:
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is 'pissa'; the adapter belongs to W - s B0 A0. Give the "
                "base W (base), or the adapter as it was saved before training (initial)"
            )
        return PEFT, BaseStarts(folder, BaseModel.of(base, folder.factors))
    if init not in PLAIN_STARTS:
        raise ValueError(
            f"{folder.config_path}: init_lora_weights is {init!r}, which changes the base. Give the adapter as it was "
            "saved before training (initial)"
        )
    check_unused(f"{source} is a LoRA; if it was trained on a residual model, initial has to say so", base=base)
    if subtracted or (subtracted is None and _is_subtracted(folder)):
        _check_subtracted(folder)
        return SUBTRACTED, Starts()
    return PLAIN, Starts()


def check_unused(reason: str, **arguments: object) -> None:
    """Raises ValueError for an argument that is given."""
    for name, value in arguments.items():
        if value not in (None, False):
            raise ValueError(f"{reason}; {name} is of no use with it: leave it out")


def _check_no_parameters(folder: LoraFolder) -> None:
    if names := folder.config["target_parameters"]:
        raise ValueError(
            f"{folder.config_path}: target_parameters are {shown(names)}; PEFT starts no PiSSA in parameters, and "
            "stacks the factors of experts wrongly when it subtracts; such an adapter cannot be converted. If it was "
            "trained on a residual model, give the initial adapter (initial)"
        )


def check_described(folder: LoraFolder, records: Mapping[str, LayerRecord]) -> None:
    """Checks that the plain LoRA of an adapter of ours is the one that the records of its layers describe.

    Raises:
        ValueError: the files do not belong together.
    """
    folder.weights.expect_checksums()
    present = {layer: factors for factors in folder.factors.values() for layer in factors.layers}
    for name, layer in records.items():
        found = present.pop(name, None)
        if found is None:
            raise ValueError(f"{folder.weights.path} holds no factors of layer {name}, which is in {PISSA_RECORD}")
        if found.rank != 2 * layer.r or not math.isclose(found.scaling, layer.scaling, rel_tol=1e-12):
            raise ValueError(
                f"{folder.config_path}: layer {name} has rank {found.rank} and scaling {found.scaling:g}; in "
                f"{PISSA_RECORD} it has {2 * layer.r} and {layer.scaling:g}: the files do not belong together"
            )
    if present:
        raise ValueError(f"{folder.weights.path} has factors of layer {min(present)}, which is not in {PISSA_RECORD}")


def _start_from_initial(folder: LoraFolder, given: str | os.PathLike[str], base: Base) -> Starts:
    path, residual = initial_folder(given)
    initial = LoraFolder.read(path)
    starts = start_from_initial(folder, initial)
    if base is not None:
        if residual is None:
            raise ValueError(f"base is only compared with a residual model, and {path} lies in none: leave base out")
        check_sum(initial, starts, BaseModel.of(residual, initial.factors), BaseModel.of(base, initial.factors))
    if residual is not None and (kind := quantised_kind(residual)) is not None:
        warnings.warn(
            f"The residual in {residual} is quantised ({kind}). On the unmodified base the change lacks its error, and "
            f"is only approximately the function that was trained: `pissa merge {folder.config_path.parent} --base "
            f"{residual} OUT` writes that as a model of its own, exactly.",
            InexactLoraWarning,
            stacklevel=5,
        )
    return starts


def _is_subtracted(folder: LoraFolder) -> bool:
    """Whether the second half of every layer's factors is A0 and -B0 of a singular value decomposition."""
    if any(factors.rank % 2 or factors.rank < 4 or len(factors.layers) > 1 for factors in folder.factors.values()):
        return False
    for target in folder.factors:
        delta = DeltaWeight.subtracted(1.0, *folder.matrices(target)[0])
        assert delta.start is not None
        a0, b0 = delta.start
        gram_a, gram_b = a0 @ a0.mT, b0.mT @ b0
        lengths = gram_a.diagonal()
        # Singular vectors are orthogonal, and factors rounded, up to float32's roundoff times their length.
        tolerance = (a0.shape[1] + len(b0)) * 2.0**-24 * lengths.max()
        if max((gram - lengths.diag()).abs().max() for gram in (gram_a, gram_b)) > tolerance:
            return False
        if (delta.a - a0).norm() >= a0.norm() or (delta.b - b0).norm() >= b0.norm():
            return False
    return True


def _check_subtracted(folder: LoraFolder) -> None:
    _check_no_parameters(folder)
    for field in ("modules_to_save", "trainable_token_indices"):
        if folder.config.get(field) and not folder.other_keys:
            raise ValueError(
                f"{folder.weights.path} lacks {field}, which PEFT leaves out when it subtracts the initial "
                "adapter: convert the adapter that was trained, with initial"
            )
    for target, factors in folder.factors.items():
        if factors.rank % 2:
            raise ValueError(f"{folder.weights.path}: layer {target} has rank {factors.rank}; [B, -B0] has an even one")

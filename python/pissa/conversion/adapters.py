"""Adapters of every PiSSA layout as a plain LoRA for the unmodified base, of the same function, or of a lower rank."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pissa.conversion.change import Change, Converted
from pissa.conversion.lora_start import (
    Start,
    check_residual,
    initial_folder,
    load_base,
    residual_of,
    start_from_base,
    start_from_initial,
)
from pissa.files.json_file import shown
from pissa.files.lora_folder import LoraFolder, with_sizes
from pissa.files.plain_lora import PREFIX
from pissa.files.record import AdapterRecord
from pissa.files.save import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PISSA_RECORD
from pissa.files.staged import Staged, check_unused
from pissa.files.tensor_file import write_tensors

# Starts of PEFT's that leave the base as it is.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class ConvertedLayer(NamedTuple):
    """What became of one layer, or of one weight of all experts of a module."""

    rank_before: int
    rank: int
    energy: float
    """The square of the Frobenius norm of the change s (B A - B0 A0)."""
    lost: float
    """Of it, the square of the norm of what was left out."""

    @property
    def kept(self) -> float:
        """The share of the energy that was kept."""
        return 1 - self.lost / self.energy if self.energy else 1.0


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    layout: str
    """What the source was."""
    layers: dict[str, ConvertedLayer]
    """By name."""
    worst: float
    """The largest error in the check on random inputs, as a part of what rounding allows there: at most 1."""

    @property
    def kept(self) -> float:
        """The share of the energy of all layers that was kept."""
        return total_kept(self.layers.values())


def total_kept(layers: Iterable[ConvertedLayer]) -> float:
    """The share of the energy of the layers that was kept."""
    layers = list(layers)
    energy = sum(layer.energy for layer in layers)
    return 1 - sum(layer.lost for layer in layers) / energy if energy else 1.0


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: nn.Module | str | os.PathLike[str] | None = None,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    subtracted: bool | None = None,
    progressbar: bool = False,
) -> Conversion:
    """Writes the adapter in folder `source` to `target`, a new folder, as a plain LoRA for the unmodified base.

    What `source` is, in the order in which it is looked at:

    - it holds pissa.json: an adapter of ours, whose LoRA is written already;
    - `initial` is given: PEFT's PiSSA (or OLoRA, CorDA), trained on W - s B0 A0, where B0, A0 are in the initial
      adapter, which was saved before training. `initial` is its folder, or that of a residual model in which it is
      called pissa_init, as the paper's authors have it; that is found by itself where the adapter's
      base_model_name_or_path is the residual model's folder. With `base`, residual + s B0 A0 is compared with it;
    - its init_lora_weights is "pissa": B0, A0 are computed from `base` once more, as PEFT does, and must be the same as
      then: give the model in the dtype that it was trained in. On another machine they are the same but for rounding,
      which is warned of where it matters. "pissa_niter_N" cannot be computed again;
    - `subtracted`: [B, -B0]·[A ; A0], what PEFT writes with path_initial_model_for_weight_conversion. It is recognised
      without being asked if the second halves are, in every layer, what a singular value decomposition gives (two or
      more rows and columns, orthogonal, of the same lengths), and the first halves are closer to them than zero is;
    - otherwise a plain LoRA, for which `rank` or `energy` has to be given. An adapter that was trained on a residual
      model looks the same, unless its base_model_name_or_path says so: give `initial`.

    The change s (B A - B0 A0) is written as s [dB | B0]·[A ; dA], which has no cancellation, of rank 2r. The dtype is
    float32. Other tensors (biases, magnitudes, `modules_to_save`, embeddings) stay as they are; an adapted layer's own
    weight, which PEFT saves of embeddings and output layers, becomes W. An adapter that was trained on a residual that
    was rounded (bfloat16, 4 bits) lacks that error on the unmodified base, and with `initial` that of A0 and B0, which
    PEFT rounds as well. What no file shows: PEFT put the residual of an output layer into the input embeddings as well
    where these are tied; such an adapter is refused with `base` only.

    DoRA's magnitudes belong to W + dW in every layout and are kept. With a lower rank, dW is approximated and the
    magnitudes still are those of the old one; the energy is that of dW.

    At the end what was written is read back and compared with the source, on random inputs to each layer.

    Args:
        source: folder of an adapter.
        target: folder that does not exist, or is empty.
        base: the unmodified model, its folder or name.
        initial: folder of the adapter before training.
        rank: the largest rank that a layer may have; the best approximation of that rank is taken.
        energy: instead, share of ‖dW‖² that each layer keeps, above 0 and at most 1, with the smallest rank that does.
            Experts that are fused have one rank.
        subtracted: whether the source is [B, -B0]·[A ; A0]; None to see.
        progressbar: show one while the base is decomposed.

    Raises:
        ValueError: what is wrong, naming file and tensor or layer. Nothing has been written then.
    """
    source, target = Path(source), Path(target)
    _check_arguments(target, rank, energy)
    folder = LoraFolder.read(source)
    layout, start = _layout(source, folder, base, initial, subtracted, progressbar)
    if layout == _PLAIN and rank is None and energy is None:
        raise ValueError(
            f"{source} is a plain LoRA already. Give rank= or energy= to lower its rank; initial= if it was trained on "
            "a residual; subtracted=True if it is [B, -B0]·[A ; A0]"
        )
    tensors = _other_tensors(folder, start)
    layers, sizes = {}, {}
    for name, factors in folder.factors.items():
        part = _converted(folder, name, layout, start, rank, energy)
        tensors |= factors.pack(part.written)
        layers[name] = ConvertedLayer(factors.rank, part.rank, part.energy, part.lost)
        sizes[name] = part.rank, factors.scaling
    if folder.config["use_dora"] and any(layer.lost for layer in layers.values()):
        warnings.warn(
            f"{source} has DoRA's magnitudes, which were trained with the change that is now approximated: they are "
            "kept, and the function differs by more than the energy that is left out says",
            UserWarning,
            stacklevel=2,
        )
    config = with_sizes(folder.config, sizes) | {"base_model_name_or_path": _base_name(folder, base)}
    with Staged(target) as staged:
        paths = staged.path(ADAPTER_CONFIG), staged.path(ADAPTER_WEIGHTS)
        paths[0].write_text(json.dumps(config, indent=2, sort_keys=True))
        write_tensors(paths[1], tensors)
        written = LoraFolder.of(*paths)
        worst = 0.0
        for name in folder.factors:
            part = _converted(folder, name, layout, start, rank, energy)
            worst = max(worst, _check_written(target, name, part, written))
        _check_other_tensors(target, tensors, written)
    return Conversion(layout, layers, worst)


def _converted(
    folder: LoraFolder, name: str, layout: str, start: Start, rank: int | None, energy: float | None
) -> Converted:
    """One layer; made twice, since all of them in float64 take much memory."""
    factors = folder.factors[name]
    make = Change.subtracted if layout == _SUBTRACTED else Change
    changes = [make(factors.scaling, *pair) for pair in folder.matrices(name)]
    if name in start:
        a0, b0 = start[name]
        changes = [changes[0]._replace(start=(a0.double(), b0.double()))]
    return Converted.of(factors, changes, rank, energy)


def _check_arguments(target: Path, rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise ValueError(f"got rank={rank!r} and energy={energy!r}; needed: one of them, or none")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be a whole number from 1 on, got {rank!r}")
    if energy is not None and (not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise ValueError(f"energy must be a number above 0 and at most 1, got {energy!r}")
    check_unused(target)


# ---- What the source is ----------------------------------------------------------------------------------------------

_OURS = "an adapter of pissa"
_INITIAL = "an adapter on a residual, and its initial adapter"
_PEFT = "PEFT's PiSSA, its start computed from the base"
_SUBTRACTED = "[B, -B0]·[A ; A0]"
_PLAIN = "a plain LoRA"


def _layout(
    source: Path,
    folder: LoraFolder,
    base: nn.Module | str | os.PathLike[str] | None,
    initial: str | os.PathLike[str] | None,
    subtracted: bool | None,
    progressbar: bool,
) -> tuple[str, Start]:
    """What the source is, and the start factors that its factors have to be compared with."""
    init = folder.config["init_lora_weights"]
    if (source / PISSA_RECORD).is_file():
        _check_unused(f"{source} is an adapter of pissa", base=base, initial=initial, subtracted=subtracted)
        _check_record(source, folder)
        return _OURS, {}
    if initial is None:
        initial = residual_of(folder)
    if initial is not None:
        _check_unused(f"{source} is trained on a residual", subtracted=subtracted)
        _check_no_parameters(folder)
        return _INITIAL, _start_from_initial(folder, initial, base)
    if isinstance(init, str) and init.startswith("pissa"):
        _check_unused(f"{folder.config_path} has init_lora_weights {init!r}", subtracted=subtracted)
        _check_no_parameters(folder)
        if init != "pissa":
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is {init!r}, a random decomposition that PEFT does not seed, "
                "so its start cannot be computed again. Give the adapter as it was saved before training, initial=. "
                "Without it the adapter can only be used with the residual model that it was trained on"
            )
        if base is None:
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is 'pissa'; the adapter belongs to W - s B0 A0. Give the "
                "base W, base=, or the adapter as it was saved before training, initial="
            )
        return _PEFT, start_from_base(folder, load_base(base), progressbar=progressbar)
    if init not in _PLAIN_STARTS:
        raise ValueError(
            f"{folder.config_path}: init_lora_weights is {init!r}, which changes the base. Give the adapter as it was "
            "saved before training, initial="
        )
    _check_unused(f"{source} is a LoRA; if it was trained on a residual model, initial= has to say so", base=base)
    if subtracted or (subtracted is None and _is_subtracted(folder)):
        _check_no_parameters(folder)
        for field in ("modules_to_save", "trainable_token_indices"):
            if folder.config.get(field) and not folder.other_keys:
                raise ValueError(
                    f"{folder.weights.path} lacks {field}, which PEFT leaves out when it subtracts the initial "
                    "adapter: convert the adapter that was trained, with initial="
                )
        for target, factors in folder.factors.items():
            if factors.rank % 2:
                raise ValueError(
                    f"{folder.weights.path}: layer {target} has rank {factors.rank}; [B, -B0] has an even one"
                )
        return _SUBTRACTED, {}
    return _PLAIN, {}


def _check_unused(reason: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value not in (None, False):
            raise ValueError(f"{reason}; {name} is of no use with it: leave it out")


def _check_no_parameters(folder: LoraFolder) -> None:
    if names := folder.config["target_parameters"]:
        raise ValueError(
            f"{folder.config_path}: target_parameters are {shown(names)}; PEFT starts no PiSSA in parameters, and "
            "stacks the factors of experts wrongly when it subtracts; such an adapter cannot be converted"
        )


def _check_record(source: Path, folder: LoraFolder) -> None:
    """Whether the plain LoRA is the one that pissa.json speaks of; warns where it lacks the rounding of a residual."""
    record = AdapterRecord.read(source / PISSA_RECORD)
    folder.weights.verify()
    missing = set(folder.factors)
    for name, layer in record.layers.items():
        path, _, leaf = name.rpartition(".")
        parameter = f"{path.rpartition('.')[0]}.{leaf}"  # of fused experts: path.0.name, path.1.name, ...
        target = next((found for found in (name, f"{name}.weight", parameter) if found in folder.factors), None)
        if target is None:
            raise ValueError(f"{folder.weights.path} holds no factors of layer {name}, which is in {PISSA_RECORD}")
        found = folder.factors[target]
        if found.rank != 2 * layer.r or not math.isclose(found.scaling, layer.scaling, rel_tol=1e-12):
            raise ValueError(
                f"{folder.config_path}: layer {name} has rank {found.rank} and scaling {found.scaling:g}; in "
                f"{PISSA_RECORD} it has {2 * layer.r} and {layer.scaling:g}: the files do not belong together"
            )
        missing.discard(target)
    if missing:
        raise ValueError(f"{folder.weights.path} has factors of layer {min(missing)}, which is not in {PISSA_RECORD}")
    if forms := {layer.form.kind for layer in record.layers.values()} - {"implicit"}:
        warnings.warn(
            f"{source} was trained on a residual that is stored as {' and '.join(sorted(forms))}: on the unmodified "
            "base the LoRA lacks the error of that storage, so it is only approximately the function that was trained",
            UserWarning,
            stacklevel=4,
        )


def _start_from_initial(
    folder: LoraFolder, given: str | os.PathLike[str], base: nn.Module | str | os.PathLike[str] | None
) -> Start:
    path, residual = initial_folder(given)
    initial = LoraFolder.read(path)
    start = start_from_initial(folder, initial)
    if base is not None:
        if residual is None:
            raise ValueError(f"base is only compared with a residual model, and {path} lies in none: leave base out")
        check_residual(initial, start, load_base(residual), load_base(base))
    return start


def _is_subtracted(folder: LoraFolder) -> bool:
    """Whether the second half of every layer's factors is A0 and -B0 of a singular value decomposition."""
    if any(factors.rank % 2 or factors.rank < 4 or factors.experts > 1 for factors in folder.factors.values()):
        return False
    for target in folder.factors:
        change = Change.subtracted(1.0, *folder.matrices(target)[0])
        assert change.start is not None
        a0, b0 = change.start
        gram_a, gram_b = a0 @ a0.mT, b0.mT @ b0
        lengths = gram_a.diagonal()
        # Singular vectors are orthogonal, and factors rounded, up to float32's roundoff times their length.
        tolerance = (a0.shape[1] + len(b0)) * 2.0**-24 * lengths.max()
        if max((gram - lengths.diag()).abs().max() for gram in (gram_a, gram_b)) > tolerance:
            return False
        if (change.a - a0).norm() >= a0.norm() or (change.b - b0).norm() >= b0.norm():
            return False
    return True


# ---- What is written -------------------------------------------------------------------------------------------------


def _other_tensors(folder: LoraFolder, start: Start) -> dict[str, Tensor]:
    """The tensors beside the factors. The weight of an adapted layer, W - s B0 A0, becomes W."""
    tensors = {name: folder.weights.read(name) for name in folder.other_keys}
    for target, (a0, b0) in start.items():
        factors = folder.factors[target]
        if (name := f"{PREFIX}{target}.base_layer.weight") in tensors:
            weight = tensors[name]
            product = factors.scaling * (b0.double() @ a0.double())
            if "embedding" in factors.keys[0]:
                product = product.mT
            if product.numel() != weight.numel():
                raise ValueError(
                    f"{folder.weights.path}: tensor {shown(name)} is {list(weight.shape)}, unlike its factors"
                )
            tensors[name] = (weight.double() + product.reshape(weight.shape)).to(weight.dtype).contiguous()
    return tensors


def _base_name(folder: LoraFolder, base: nn.Module | str | os.PathLike[str] | None) -> str | None:
    """Of the unmodified base, as far as it is known: a residual model is not it."""
    if residual_of(folder) is None and (name := folder.config["base_model_name_or_path"]):
        return str(name)
    if base is None or isinstance(base, nn.Module):
        return getattr(base, "name_or_path", None) or None
    return str(base)


def _check_written(target: Path, name: str, part: Converted, written: LoraFolder) -> float:
    """Compares a layer in what is about to become the files of `target` with the source."""
    if name not in written.factors:
        raise ValueError(f"{target} has not been written: layer {name} got lost. Please report this")
    error = part.error(written.factors[name].scaling, written.matrices(name))
    if not error <= 1:
        raise ValueError(
            f"{target} has not been written: in layer {name} the change that was read back differs from that of the "
            f"source by {error:.3g} times what rounding allows. Please report this"
        )
    return error


def _check_other_tensors(target: Path, tensors: Mapping[str, Tensor], written: LoraFolder) -> None:
    if set(written.weights.names) != tensors.keys():
        raise ValueError(f"{target} has not been written: tensors got lost. Please report this")
    for name in written.other_keys:
        if not torch.equal(written.weights.read(name), tensors[name]):
            raise ValueError(f"{target} has not been written: tensor {shown(name)} was read back with other values")

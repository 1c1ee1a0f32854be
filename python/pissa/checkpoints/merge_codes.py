"""What a merge into the codes of the base writes: new codes under the same scales, of the layers that an adapter
changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pissa import ops
from pissa.base.digest import seed_of
from pissa.base.released_layouts import join_rows
from pissa.checkpoints.load import load, of_layer
from pissa.checkpoints.rewrite import Layers, Plan, Replace, Result
from pissa.checkpoints.trained import TrainedWeights
from pissa.model.batches import Batch
from pissa.model.calibrate import observe

DENSE = "`pissa merge` without --quant writes a dense model"


class Kept(NamedTuple):
    """What became of a change in codes."""

    share: float
    """The share of the change that the new codes have, its coefficient in a least squares fit of theirs."""
    noise: float
    """The rest of theirs, relative to the change (Frobenius norms)."""
    moved: float
    """The share of the elements with another code."""
    beyond: float
    """The share of the elements whose change leads beyond the levels of their block."""

    @staticmethod
    def of(sums: Result) -> Kept:
        """For the sums in the results of units."""
        share = sums["along"] / sums["change"] if sums["change"] else 1.0
        rest = max(sums["square"] - share * sums["along"], 0.0)
        noise = (rest / sums["change"]) ** 0.5 if sums["change"] else 0.0
        return Kept(share, noise, sums["moved"] / sums["elements"], sums["beyond"] / sums["elements"])


def coded_units(plan: Plan) -> list[Layers]:
    """The layers of an adapter's targets whose weights are codes.

    Raises:
        ValueError: codes would have to become other codes than those of the same weight with a low-rank change, or only
            some of a target's weights are codes.
    """
    coded, found = plan.source.coded, []
    for unit in plan.units:
        if isinstance(unit, Replace) and unit.tensor in coded:
            raise ValueError(f"{unit.tensor} is codes, and was trained whole: {DENSE}")
    for unit in plan.adapted:
        if not (in_codes := [tensor in coded for tensor in unit.tensors])[0]:
            continue
        if not all(in_codes) or any(layer.own_key for layer in unit.layers):
            raise ValueError(f"{unit.name} is in codes in part, or was trained on another weight: {DENSE}")
        found.append(unit)
    if not found:
        raise ValueError(f"the adapter changes no weight of {plan.source.folder} that is codes: {DENSE}")
    return found


def check_low_rank(adapter: TrainedWeights) -> None:
    """Raises ValueError for an adapter whose change is no low-rank sum on the codes of its base."""
    path = adapter.folder.path
    if adapter.folder.config["use_dora"]:
        raise ValueError(f"{path} has use_dora, whose change scales whole rows: {DENSE}")
    if not adapter.is_on_weights:
        raise ValueError(f"{path} was trained on a residual, whose codes lack its start: {DENSE}")


def moments_of(adapter: TrainedWeights, calibration: Iterable[Batch] | None) -> Mapping[str, Tensor]:
    """The second moments of what the adapted linear layers read in the base, by layer; none without a calibration. The
    whole model runs in memory."""
    if calibration is None:
        return {}
    model = load(adapter.source.folder, adapter=adapter.folder.path, is_trainable=False)
    return observe(model, calibration, progressbar=False).moments


def merged_layers(
    adapter: TrainedWeights, unit: Layers, moments: Mapping[str, Tensor]
) -> Iterator[tuple[Result, list[tuple[str, Tensor, int | None]]]]:
    """Yields for each layer of a unit the sums of `ops.Merged`, with the number of elements, and the new codes: the
    name of each weight of the checkpoint, uint8, and the number of the matrix in a stack. A layer whose inputs have a
    second moment is rounded with error feedback."""
    source = adapter.source
    for layer, (a, b) in zip(unit.layers, adapter.factors(unit), strict=True):
        weights = [source.coded[part.tensor].read(part.member) for part in layer.parts]
        with of_layer(layer.name):
            weight = join_rows(weights)
            moment = moments.get(layer.name)
            if layer.parts[0].transposed != source.coded[layer.parts[0].tensor].is_transposed:
                a, b, moment = b.mT, a.mT, None  # the columns of these codes are outputs
            adapter.check_base(layer, weight)
            scaling, seed = adapter.scaling(layer, unit.name), seed_of(layer.name)
            merged = ops.merge_codes(weight, a.contiguous(), b.contiguous(), scaling, second_moment=moment, seed=seed)
        sums = {"elements": weight.shape[0] * weight.shape[1], **merged._asdict()}
        del sums["weight"]
        parts = torch.split(merged.weight.codes, [part.codes.numel() for part in weights])
        yield sums, [(part.tensor, codes, part.member) for part, codes in zip(layer.parts, parts, strict=True)]

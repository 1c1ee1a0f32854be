"""An adapter of any layout as a plain LoRA for the unmodified base.

Other tools took factors A0, B0 out of a base W and trained on W - s B0 A0. These factors are in the initial adapter if
it was saved. Otherwise they are computed from the base as in PEFT, a layer at a time.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pissa.adapters.lora_folder import INITIAL_FOLDER, LoraFolder, check_same_layers, open_adapter
from pissa.adapters.peft_layout import ADAPTER_CONFIG, Matrices, base_weight_key, inexact_lora
from pissa.base.classes import base_of
from pissa.base.protocol import Base
from pissa.base.weights import with_weight
from pissa.containers.hub import Name, checkpoint_folder
from pissa.containers.messages import first_line, shown
from pissa.containers.model_folder import (
    CONFIG,
    Composition,
    class_of,
    matrix_of,
    meta_model,
    model_config,
    quantised_kind,
)
from pissa.containers.released_codes import check_dense, open_dense
from pissa.containers.tensor_file import Source
from pissa.notices import InexactLoraWarning, PissaWarning, UncertainStartWarning, WholeModelWarning
from pissa.ops.checks import FLOATS
from pissa.ops.low_rank import Spectrum, join_difference

OURS = "an adapter of pissa"
INITIAL = "an adapter on a residual, and its initial adapter"
ON_RESIDUAL = "an adapter on a residual, which is the base"
PEFT = "PEFT's PiSSA, its start computed from the base"
SUBTRACTED = "[B, -B0]·[A ; A0]"
PLAIN = "a plain LoRA"

GivenBase = nn.Module | Name | None
"""The unmodified base, as users give it: a model in memory, its folder or its name."""

# A computed start whose error is larger, relative to ‖B A - B0 A0‖, is reported.
_DOUBT = 0.01


@dataclass(frozen=True)
class PlainLora:
    """An adapter as a plain LoRA for the unmodified base, s b a in each layer."""

    folder: LoraFolder
    what: str
    """The kind of the adapter, in words: one of the constants above."""
    initial: LoraFolder | None = None
    """The adapter before training, which its base lacked."""
    computed: ComputedStart | None = None
    """The start that its base lacked, if it is computed from the base."""

    @staticmethod
    def of(folder: LoraFolder, base: GivenBase, initial: Name | None, subtracted: bool | None) -> PlainLora:
        """Determines the kind of an adapter. The arguments are those of `convert`."""
        init = folder.config["init_lora_weights"]
        if folder.record is not None:
            check_not_given(f"{folder.path} is an adapter of pissa", base=base, initial=initial, subtracted=subtracted)
            forms = {layer.form.kind for layer in folder.record.layers.values()} - {"implicit"}
            if forms:
                warnings.warn(inexact_lora(forms), InexactLoraWarning, stacklevel=3)
            return PlainLora(folder, OURS)
        given = folder.residual if initial is None else initial
        if given is not None:
            check_not_given(f"{folder.path} is trained on a residual", subtracted=subtracted)
            return PlainLora(folder, INITIAL, initial=_read_initial(folder, given, base))
        if folder.is_pefts_pissa:
            check_not_given(f"{folder.config_path} has init_lora_weights {init!r}", subtracted=subtracted)
            _check_no_parameters(folder)
            return PlainLora(folder, PEFT, computed=ComputedStart(folder, base))
        if not folder.leaves_base:
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is {init!r}, which changes the base. Give the adapter as it "
                "was saved before training (initial)"
            )
        check_not_given(
            f"{folder.path} is a LoRA; if it was trained on a residual model, initial has to say so", base=base
        )
        if subtracted or (subtracted is None and _is_subtracted(folder)):
            _check_subtracted(folder)
            return PlainLora(folder, SUBTRACTED)
        return PlainLora(folder, PLAIN)

    @property
    def layers(self) -> int:
        """The number of layers that it changes."""
        return sum(len(factors.layers) for factors in self.folder.factors.values())

    @property
    def scaling(self) -> float:
        """The scaling of the first target, which usually all targets have."""
        return next(iter(self.folder.factors.values())).scaling

    def rank(self, target: str) -> int:
        """The largest rank that the factors of a target may have."""
        return self.folder.factors[target].rank * (2 if self.what in (INITIAL, PEFT) else 1)

    def starts(self, target: str) -> list[Matrices]:
        """The factors A0 [r, in] and B0 [out, r] of each layer of a target, float64, with which the trained ones must
        be compared; none if the start is zero."""
        if self.what == SUBTRACTED:
            return [_halves(*pair)[1] for pair in self.folder.matrices(target)]
        if self.computed is not None:
            return self.computed.starts(target)
        found = [] if self.initial is None else self.initial.matrices(target)
        return found if any(a0.any() and b0.any() for a0, b0 in found) else []

    def matrices(self, target: str, starts: list[Matrices] | None = None) -> list[Matrices]:
        """Factors a [k, in] and b [out, k] of the change of each layer of a target, float64: without cancellation, [A ;
        dA] and [dB | B0], or A and B if there are no `starts`. These are computed unless they are given."""
        starts = self.starts(target) if starts is None else starts
        trained = self.folder.matrices(target)
        if self.what == SUBTRACTED:
            trained = [_halves(*pair)[0] for pair in trained]
        if not starts:
            return trained
        pairs = zip(trained, starts, strict=True)
        return [join_difference(a, a - a0, b - b0, b0) for (a, b), (a0, b0) in pairs]

    def own_weight(self, target: str, starts: list[Matrices]) -> Tensor:
        """The own weight of an adapted layer, from the files, for the unmodified base: W - s B0 A0 becomes W."""
        name, factors = base_weight_key(target), self.folder.factors[target]
        weight = self.folder.weights.read(name)
        if not starts or self.what == SUBTRACTED:
            return weight
        a0, b0 = starts[0]
        product = factors.scaling * (b0 @ a0)
        if factors.is_embedding:
            product = product.mT
        if product.numel() != weight.numel():
            raise ValueError(
                f"{self.folder.weights.path}: tensor {shown(name)} is {list(weight.shape)}, unlike its factors"
            )
        return (weight.double() + product.reshape(weight.shape)).to(weight.dtype).contiguous()

    def base_name(self, base: GivenBase) -> str | None:
        """The name of the unmodified base, if it is known. The name of a residual model does not count."""
        if self.folder.residual is None and (name := self.folder.config["base_model_name_or_path"]):
            return str(name)
        if base is None or isinstance(base, nn.Module):
            return getattr(base, "name_or_path", None) or None
        return str(base)

    def doubts(self) -> list[PissaWarning]:
        """Warnings about the factors, after all of them have been read."""
        return [] if self.computed is None else self.computed.doubts()


def check_not_given(reason: str, **arguments: object) -> None:
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


def _read_initial(folder: LoraFolder, given: Name, base: GivenBase) -> LoraFolder:
    """The initial adapter, in the folder `given` or, if that is a residual model, in its pissa_init."""
    path = Path(given)
    if (path / INITIAL_FOLDER / ADAPTER_CONFIG).is_file() and not (path / ADAPTER_CONFIG).is_file():
        path = path / INITIAL_FOLDER
    around = path.resolve().parent
    residual = around if path.name == INITIAL_FOLDER and (around / CONFIG).is_file() else None
    initial = open_adapter(path)
    check_start(folder, initial)
    if base is not None:
        if residual is None:
            raise ValueError(f"base is only compared with a residual model, and {path} is in none: leave base out")
        check_sum(initial, residual, base)
    if residual is not None and (kind := quantised_kind(residual)) is not None:
        warnings.warn(
            f"The residual in {residual} is quantised ({kind}). On the unmodified base the change lacks its error, and "
            f"is only approximately the function that was trained: `pissa merge {folder.path} --base {residual} OUT` "
            "writes that as a model of its own, exactly.",
            InexactLoraWarning,
            stacklevel=4,
        )
    return initial


def _halves(a: Tensor, b: Tensor) -> tuple[Matrices, Matrices]:
    (a, a0), (b, minus_b0) = a.chunk(2), b.chunk(2, dim=1)
    return (a, b), (a0, -minus_b0)


def _is_subtracted(folder: LoraFolder) -> bool:
    """Whether the second halves of every layer's factors are A0 and -B0 of a singular value decomposition."""
    if any(factors.rank % 2 or factors.rank < 4 or len(factors.layers) > 1 for factors in folder.factors.values()):
        return False
    for target in folder.factors:
        (a, b), (a0, b0) = _halves(*folder.matrices(target)[0])
        gram_a, gram_b = a0 @ a0.mT, b0.mT @ b0
        lengths = gram_a.diagonal()
        # Singular vectors are orthogonal and factors rounded, up to float32's roundoff times their length.
        tolerance = (a0.shape[1] + len(b0)) * 2.0**-24 * lengths.max()
        if max((gram - lengths.diag()).abs().max() for gram in (gram_a, gram_b)) > tolerance:
            return False
        if (a - a0).norm() >= a0.norm() or (b - b0).norm() >= b0.norm():
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


# ---- The base --------------------------------------------------------------------------------------------------------


class BaseModel:
    """The base of an adapter, called `what` in messages: a model in memory, or one in a folder. In a folder, a layer at
    a time is read. If the weights of the adapter's layers cannot be read one by one, the model is loaded as a whole,
    with a warning."""

    def __init__(self, base: nn.Module | Name, adapter: LoraFolder, what: str = "base") -> None:
        self.model: nn.Module
        """The model, without values if it is in a folder."""
        self._source: Source | None = None
        self._adapter, self._what = adapter, what
        if isinstance(base, PeftModel):
            raise ValueError("base is a PeftModel, in which PiSSA has replaced weights; needed: the unmodified model")
        if isinstance(base, nn.Module):
            self.model = base
        else:
            try:
                self._open(base)
            except ValueError as reason:
                self.model, self._source = load_base(base), None
                warnings.warn(
                    f"{base} is loaded as a whole, into memory, because its weights cannot be read one by one: "
                    f"{reason}",
                    WholeModelWarning,
                    stacklevel=5,
                )
        self.bases = {target: self._base(target) for target in adapter.factors}
        """The bases by target, without values if the model is in a folder."""

    def _open(self, base: Name) -> None:
        self._source = source = open_dense(checkpoint_folder(base))
        self.model = model = meta_model(source.folder)
        check_dense(source)
        for dtype in {source.entry(name).dtype for name in source.names}:
            if model.config.dtype not in (None, torch.promote_types(dtype, model.config.dtype)):
                raise ValueError(
                    f"{source.folder} holds {dtype}, which transformers rounds to {model.config.dtype}, of config.json"
                )
        self._composition = Composition(model, source.names)
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        for name, module in model.named_modules():
            if name in self._adapter.factors and uses[id(getattr(module, "weight", None))] == 1:
                self._composition.matrix(f"{name}.weight", transposed=False)

    @contextmanager
    def matrix(self, target: str) -> Iterator[Tensor]:
        """The weight [out, in] of a layer."""
        if self._source is None:
            yield self.bases[target].matrix()
            return
        parts = self._composition.matrix(f"{target}.weight", transposed=False)
        yield self._base(target, matrix_of(parts, self._source)).matrix()
        self._source.release([part.tensor for part in parts])

    def _base(self, target: str, weight: Tensor | None = None) -> Base:
        try:
            layer = self.model.get_submodule(target)
        except AttributeError:
            raise ValueError(
                f"{self._adapter.weights.path}: the {self._what} has no layer {target}; is it the one that the adapter "
                "was trained on?"
            ) from None
        base = base_of(layer if weight is None else with_weight(layer, weight))
        if base.kind not in (nn.Linear, Conv1D, nn.Embedding):
            raise ValueError(f"layer {target} is a {type(layer).__name__}, in which PEFT starts no PiSSA adapter")
        found, factors = base.parameter, self._adapter.factors[target]
        shape = factors.out, math.prod(factors.row)
        if found.dtype not in FLOATS or tuple(base.matrix().shape) != shape:
            raise ValueError(
                f"layer {target} is {found.dtype} {list(found.shape)} in the {self._what}; needed: a float weight, "
                f"{list(shape)} as a matrix, from which the adapter comes"
            )
        return base


def load_base(base: Name) -> nn.Module:
    """Loads the model of a folder or a name, in the dtype of its files, on the CPU."""
    try:
        return cast(nn.Module, class_of(model_config(base)).from_pretrained(base, dtype="auto"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{base} cannot be loaded as a model: {first_line(error)}; load it yourself and give the model"
        ) from error


# ---- The start -------------------------------------------------------------------------------------------------------


def check_start(trained: LoraFolder, initial: LoraFolder) -> None:
    """Checks that a trained adapter can have started from the initial one."""
    ours, theirs = (
        {
            target: f"factors {list(factors.shapes(factors.rank).values())} and scaling {factors.scaling:.12g}"
            for target, factors in folder.factors.items()
        }
        for folder in (trained, initial)
    )
    what = f"{initial.weights.path} is not where {trained.weights.path} started from"
    check_same_layers(what, "in the trained adapter", ours, "in the initial one", theirs)


class ComputedStart:
    """A0 and B0 as PEFT's exact "pissa" computes them from the weights of a base, in float32, and subtracts them.

    PEFT then rounds them to the base's dtype; that difference is in dA and dB. Embeddings are left out, because PEFT
    starts them as a plain LoRA and does not change their weight.
    """

    def __init__(self, trained: LoraFolder, base: GivenBase) -> None:
        init = trained.config["init_lora_weights"]
        if init != "pissa":
            raise ValueError(
                f"{trained.config_path}: init_lora_weights is {init!r}, a random decomposition that PEFT does not "
                "seed, so its start cannot be computed again. Give the adapter as it was saved before training "
                "(initial). Without it the adapter can only be used with the residual model that it was trained on"
            )
        if base is None:
            raise ValueError(
                f"{trained.config_path}: init_lora_weights is 'pissa'; the adapter belongs to W - s B0 A0. Give the "
                "base W (base), or the adapter as it was saved before training (initial)"
            )
        if trained.config.get("layer_replication"):
            raise ValueError(
                f"{trained.config_path}: layer_replication gives layers other numbers than the base's; give the "
                "initial adapter (initial)"
            )
        self._trained, self._base = trained, BaseModel(base, trained)
        bases = self._base.bases.items()
        adapted = {id(base.parameter): target for target, base in bases if base.kind is not nn.Embedding}
        for name, parameter in self._base.model.named_parameters(remove_duplicate=False):
            target = adapted.get(id(parameter))
            if target is not None and name != f"{target}.weight":
                raise ValueError(
                    f"layer {target} shares its weight with {name}: PEFT put the residual in both, so the model that "
                    "was trained is no LoRA on the base"
                )
        self._doubts: dict[str, float] = {}

    def starts(self, target: str) -> list[Matrices]:
        """A0 [r, in] and B0 [out, r] of a layer, float32 values in float64; none for an embedding."""
        if self._base.bases[target].kind is nn.Embedding:
            return []
        with self._base.matrix(target) as weight:
            start, doubt = _aligned_start(self._trained, target, weight)
        if doubt > _DOUBT:
            self._doubts[target] = doubt
        return [start]

    def doubts(self) -> list[PissaWarning]:
        """Warnings about the starts, after all of them have been computed."""
        if not self._doubts:
            return []
        worst = max(self._doubts, key=lambda target: self._doubts[target])
        text = (
            f"{self._trained.weights.path}: in {len(self._doubts)} layers the singular values at the adapter's rank "
            f"and behind it are so close that another machine's rounding moves the start by more than {_DOUBT:.0%} of "
            f"what was learnt, by about {self._doubts[worst]:.0%} in {worst}. If the adapter was not trained on this "
            "machine, with this torch, give the initial adapter (initial), with which the conversion is exact"
        )
        return [UncertainStartWarning(text)]


def _aligned_start(adapter: LoraFolder, target: str, weight: Tensor) -> tuple[Matrices, float]:
    """A0 and B0, and how much B0 A0 may differ on another machine, relative to B A - B0 A0."""
    rank, scaling = adapter.factors[target].rank, adapter.factors[target].scaling
    a, b = adapter.matrices(target)[0]
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)  # as in peft.tuners.lora
    root = torch.diag((s[:rank] / scaling).sqrt())
    a0, b0 = (root @ vh[:rank]).cpu(), (u[:, :rank] @ root).cpu()
    # The sign of a pair of singular vectors depends on the machine. The sign of their product does not.
    signs = torch.where((a * a0).sum(1) + (b * b0).sum(0) < 0, -1.0, 1.0)
    a0, b0 = signs[:, None] * a0, b0 * signs
    moved = (a - a0).square().sum() + (b - b0).square().sum()
    if not moved < a0.square().sum() + b0.square().sum():
        raise ValueError(
            f"{adapter.weights.path}: the factors of layer {target} are farther from their start in this base than "
            "zero is: it is not the base that the adapter was trained on. If it is, give the initial adapter (initial)"
        )
    a0, b0 = a0.double(), b0.double()
    learnt = float(Spectrum.of(*join_difference(a, a - a0, b - b0, b0)).energy[0]) ** 0.5
    if rank == len(s) or not learnt:
        return (a0, b0), 0.0
    # Rounding by some units, 2^-22 s_1 in all, turns the last vectors that count by that divided by the gap after them.
    first, last, behind = (float(s[i]) / scaling for i in (0, rank - 1, rank))
    error = 2.0**-22 * first * last / max(last - behind, sys.float_info.epsilon * last)
    return (a0, b0), min(error / learnt, 1.0)


def check_sum(initial: LoraFolder, residual: Path, base: nn.Module | Name) -> None:
    """Compares W_res + s B0 A0 with W, element by element, a layer at a time.

    They may differ by the rounding of W_res, A0 and B0 to the residual's dtype, in which PEFT stores all three, and by
    that of the float32 product of r terms that was subtracted.
    """
    of_residual, of_base = BaseModel(residual, initial, "residual model"), BaseModel(base, initial)
    for target, factors in initial.factors.items():
        with of_residual.matrix(target) as residual_weight, of_base.matrix(target) as base_weight:
            kept, weight = residual_weight.detach().cpu(), base_weight.detach().cpu().double()
            [(a0, b0)] = initial.matrices(target)
            product = factors.scaling * (b0 @ a0)
            size = abs(factors.scaling) * (b0.abs() @ a0.abs())
            unit = torch.finfo(kept.dtype).eps / 2
            # If W had a wider type than W_res, both come from one rounding of the same number.
            bound = unit * (kept.double().abs() + weight.abs())
            bound += ((factors.rank + 4) * 2.0**-24 + 2 * unit) * (size + weight.abs())
            error = (kept.double() + product - weight).abs()
        if (worst := (error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max()) > 1:
            raise ValueError(
                f"the residual model and {initial.weights.path} do not add up to the base: in layer {target} they "
                f"differ by {error.max():.3g}, {worst:.3g} times what rounding explains"
            )

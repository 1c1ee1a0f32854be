"""An adapter of any layout as a plain LoRA for the unmodified base.

Other tools took factors A0, B0 out of a base W and trained on W - s B0 A0. These factors are in the initial adapter.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pissa.adapters.lora_folder import LoraFolder, check_same_layers, is_plain_lora, open_adapter
from pissa.adapters.peft_layout import Matrices, base_weight_key, inexact_lora
from pissa.containers.checkpoint import initial_adapter, residual_around
from pissa.containers.hub import Name, absolute, is_elsewhere
from pissa.containers.messages import quote
from pissa.notices import InexactLoraWarning, UnseenBaseWarning
from pissa.ops.low_rank import join_difference

OURS = "an adapter of pissa"
INITIAL = "an adapter on a residual, and its initial adapter"
ON_RESIDUAL = "an adapter on a residual, which is the base"
PLAIN = "a plain LoRA"

_CONVERT = "Convert it with the adapter before training, `pissa convert ADAPTER OUT --initial DIR`, and give OUT"


@dataclass(frozen=True)
class PlainLora:
    """An adapter as a plain LoRA for the unmodified base, s b a in each layer."""

    folder: LoraFolder
    what: str
    """The kind of the adapter, in words: one of the constants above."""
    initial: LoraFolder | None = None
    """The adapter before training, which its base lacked."""

    @staticmethod
    def of(folder: LoraFolder, base: Name | None, initial: Name | None = None) -> PlainLora:
        """Determines the kind of an adapter. The arguments are those of `convert`."""
        if folder.ours is not None:
            if initial is not None:
                raise ValueError(f"{folder.path} is an adapter of pissa; initial is of no use with it: leave it out")
            forms = {layer.form.name for layer in folder.ours.layers.values()} - {"implicit"}
            if forms:
                warnings.warn(inexact_lora(forms), InexactLoraWarning, stacklevel=3)
            return PlainLora(folder, OURS)
        initial = initial or initial_adapter(base) or initial_adapter(folder.named_base)
        if initial is not None:
            return PlainLora(folder, INITIAL, initial=_read_initial(folder, initial))
        if not folder.leaves_base:
            raise ValueError(
                f"{folder.config_path}: init_lora_weights is {folder.config['init_lora_weights']!r}, which changes the "
                f"base, and the folder lacks the factors that were taken out of it. {_CONVERT}. If it was not saved "
                "then, train again and save with PEFT's path_initial_model_for_weight_conversion, which writes a plain "
                "LoRA [P067]"
            )
        for field in ("modules_to_save", "trainable_token_indices"):
            if folder.config.get(field) and not folder.other_keys:
                raise ValueError(
                    f"{folder.weights.path} lacks {field}, which PEFT leaves out when it subtracts the initial "
                    f"adapter. Take the adapter that was trained. {_CONVERT} [P069]"
                )
        _check_base(folder, base)
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
        return self.folder.factors[target].rank * (1 if self.initial is None else 2)

    def starts(self, target: str) -> list[Matrices]:
        """The factors A0 [r, in] and B0 [out, r] of each layer of a target, float64, with which the trained ones must
        be compared; none if the start is zero."""
        starts = [] if self.initial is None else self.initial.matrices(target)
        return starts if any(a0.any() and b0.any() for a0, b0 in starts) else []

    def matrices(self, target: str, starts: list[Matrices] | None = None) -> list[Matrices]:
        """Factors a [k, in] and b [out, k] of the change of each layer of a target, float64: without cancellation, [A ;
        dA] and [dB | B0], or A and B if there are no `starts`. These are computed unless they are given."""
        starts = self.starts(target) if starts is None else starts
        trained = self.folder.matrices(target)
        if not starts:
            return trained
        pairs = zip(trained, starts, strict=True)
        return [join_difference(a, a - a0, b - b0, b0) for (a, b), (a0, b0) in pairs]

    def own_weight(self, target: str, starts: list[Matrices]) -> Tensor:
        """The own weight of an adapted layer, from the files, for the unmodified base: W - s B0 A0 becomes W."""
        name, factors = base_weight_key(target), self.folder.factors[target]
        weight = self.folder.weights.read(name)
        if not starts:
            return weight
        a0, b0 = starts[0]
        product = factors.scaling * (b0 @ a0)
        if factors.is_embedding:
            product = product.mT
        if product.numel() != weight.numel():
            raise ValueError(
                f"{self.folder.weights.path}: tensor {quote(name)} is {list(weight.shape)}, unlike its factors"
            )
        return (weight.double() + product.reshape(weight.shape)).to(weight.dtype).contiguous()

    def base_name(self, base: Name | None) -> str | None:
        """The name of the unmodified base, valid in any working directory: `base`, or the one that the adapter names;
        None if that is a residual."""
        if base is not None and initial_adapter(base) is None:
            return absolute(base)
        return None if self.initial is not None and self.folder.leaves_base else self.folder.named_base


def _check_base(folder: LoraFolder, base: Name | None) -> None:
    """Refuses an adapter if the model that it was trained on is in a folder elsewhere, because that may be a residual,
    from which the same files would mean another change. Warns if `base` is given in its place."""
    named = folder.named_base
    if (model := named if base is None else base) is not None and is_elsewhere(model):
        raise ValueError(
            f"{folder.path} was trained on {model}, which is not here and may be a residual. Give the model that it "
            f"was trained on (base). If that is a residual, and you have only its initial adapter: {_CONVERT} [P068]"
        )
    if named is not None and is_elsewhere(named):
        warnings.warn(
            f"{folder.path} names {named} as its base, which is not here. It is taken for a LoRA that was trained on "
            f"{base}. If {named} is a residual, the change is wrong. {_CONVERT}",
            UnseenBaseWarning,
            stacklevel=4,
        )


def _read_initial(folder: LoraFolder, name: Name) -> LoraFolder:
    """The initial adapter, in the folder `given` or, if that is a residual model, in its pissa_init."""
    path = Path(name)
    path = path if is_plain_lora(path) else initial_adapter(path) or path
    initial, residual = open_adapter(path), residual_around(path)
    check_start(folder, initial)
    if residual is not None and residual.quant_method is not None:
        warnings.warn(
            f"The residual in {residual.folder} is quantised ({residual.quant_method}). On the unmodified base the "
            "change lacks its error, and is only approximately the function that was trained: `pissa merge "
            f"{folder.path} --base {residual.folder} OUT` writes that as a model of its own, exactly.",
            InexactLoraWarning,
            stacklevel=4,
        )
    return initial


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
    check_same_layers(what, "in the trained adapter", ours, "in the initial one [P069]", theirs)

"""What an adapter of any layout is to the unmodified base: a plain LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pissa.conversion.lora_start import ComputedStart, GivenBase, check_start, check_sum
from pissa.files.hub import Name
from pissa.files.lora_folder import INITIAL_FOLDER, LoraFolder, open_adapter
from pissa.files.messages import shown
from pissa.files.model_folder import CONFIG, quantised_kind
from pissa.files.peft_layout import ADAPTER_CONFIG, Matrices, base_weight_key, inexact_lora
from pissa.notices import InexactLoraWarning, PissaWarning
from pissa.ops.low_rank import join_difference

OURS = "an adapter of pissa"
INITIAL = "an adapter on a residual, and its initial adapter"
PEFT = "PEFT's PiSSA, its start computed from the base"
SUBTRACTED = "[B, -B0]·[A ; A0]"
PLAIN = "a plain LoRA"


@dataclass(frozen=True)
class PlainLora:
    """An adapter as a plain LoRA for the unmodified base, s b a in each layer."""

    folder: LoraFolder
    what: str
    """What it is, in words: one of the constants above."""
    initial: LoraFolder | None = None
    """The adapter before training, which its base lacked."""
    computed: ComputedStart | None = None
    """The start that its base lacked, if it is computed from the base."""

    @staticmethod
    def of(folder: LoraFolder, base: GivenBase, initial: Name | None, subtracted: bool | None) -> PlainLora:
        """Decides what an adapter is; the arguments are those of `convert`.

        Raises:
            ValueError: an adapter that cannot be converted, or arguments that do not fit it.
        """
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
        """The scaling of the first target, which is usually that of all."""
        return next(iter(self.folder.factors.values())).scaling

    def rank(self, target: str) -> int:
        """The largest rank that the factors of a target may have."""
        return self.folder.factors[target].rank * (2 if self.what in (INITIAL, PEFT) else 1)

    def starts(self, target: str) -> list[Matrices]:
        """The factors A0 [r, in] and B0 [out, r] of each layer of a target, float64, that the trained ones have to be
        compared with; none if there are no others than zero."""
        if self.what == SUBTRACTED:
            return [_halves(*pair)[1] for pair in self.folder.matrices(target)]
        if self.computed is not None:
            return self.computed.starts(target)
        found = [] if self.initial is None else self.initial.matrices(target)
        return found if any(a0.any() and b0.any() for a0, b0 in found) else []

    def factors(self, target: str, starts: Sequence[Matrices]) -> list[Matrices]:
        """Factors a [k, in] and b [out, k] of the change of each layer of a target, float64: without cancellation, [A ;
        dA] and [dB | B0], or A and B if there are no `starts`."""
        trained = self.folder.matrices(target)
        if self.what == SUBTRACTED:
            trained = [_halves(*pair)[0] for pair in trained]
        if not starts:
            return trained
        pairs = zip(trained, starts, strict=True)
        return [join_difference(a, a - a0, b - b0, b0) for (a, b), (a0, b0) in pairs]

    def matrices(self, target: str) -> list[Matrices]:
        """The same with the `starts` of the target."""
        return self.factors(target, self.starts(target))

    def own_weight(self, target: str, starts: Sequence[Matrices]) -> Tensor:
        """The own weight of an adapted layer, which is in the files, for the unmodified base: W - s B0 A0 becomes W."""
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
        """The name of the unmodified base, if it is known; a residual model's is not it."""
        if self.folder.residual is None and (name := self.folder.config["base_model_name_or_path"]):
            return str(name)
        if base is None or isinstance(base, nn.Module):
            return getattr(base, "name_or_path", None) or None
        return str(base)

    def doubts(self) -> list[PissaWarning]:
        """What is to be known of the factors, once all have been asked for."""
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
    """The initial adapter in the folder `given`, or in that of the residual model which it has left."""
    path = Path(given)
    if (path / INITIAL_FOLDER / ADAPTER_CONFIG).is_file() and not (path / ADAPTER_CONFIG).is_file():
        path = path / INITIAL_FOLDER
    around = path.resolve().parent
    residual = around if path.name == INITIAL_FOLDER and (around / CONFIG).is_file() else None
    initial = open_adapter(path)
    check_start(folder, initial)
    if base is not None:
        if residual is None:
            raise ValueError(f"base is only compared with a residual model, and {path} lies in none: leave base out")
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
    """The factors A, B and A0, B0 of [A ; A0] and [B | -B0]."""
    (a, a0), (b, minus_b0) = a.chunk(2), b.chunk(2, dim=1)
    return (a, b), (a0, -minus_b0)


def _is_subtracted(folder: LoraFolder) -> bool:
    """Whether the second half of every layer's factors is A0 and -B0 of a singular value decomposition."""
    if any(factors.rank % 2 or factors.rank < 4 or len(factors.layers) > 1 for factors in folder.factors.values()):
        return False
    for target in folder.factors:
        (a, b), (a0, b0) = _halves(*folder.matrices(target)[0])
        gram_a, gram_b = a0 @ a0.mT, b0.mT @ b0
        lengths = gram_a.diagonal()
        # Singular vectors are orthogonal, and factors rounded, up to float32's roundoff times their length.
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

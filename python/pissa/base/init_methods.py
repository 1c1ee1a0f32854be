"""The start of an adapter: the factors of a weight by PiSSA and, for comparison, by other initialisations.

A method is a class whose instance is in the table `INIT_METHODS`; `PissaConfig.init` names it.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pissa import ops
from pissa.base.start import Origin, StartFactors
from pissa.config import ALTERNATING, PissaConfig
from pissa.ops.checks import check_weights
from pissa.ops.low_rank import empty_factors


class StartTask(NamedTuple):
    """Weights from which adapters are to start."""

    weights: Sequence[Tensor]
    """[out, in], of any dtype that `ops.split_many` takes. They are on the meta device if the method does not read
    weights."""
    origins: Sequence[Origin]
    """Rank and scaling for each."""
    config: PissaConfig
    names: Sequence[str]
    """The names of the layers in messages."""
    moments: Sequence[Tensor] | None = None
    """The second moment of each layer's inputs, as `ops.split_many` takes it, where the configuration needs them."""
    codes: Sequence[ops.QuantizedWeight] | None = None
    """The codes of each weight, if they exist already and do not change."""
    device: torch.device | None = None
    """The device for the factors; None: the device of the weights."""

    @property
    def weight_names(self) -> list[str]:
        """The names of the weights in messages."""
        return [f"layer {name}: weight" for name in self.names]


class InitMethod(ABC):
    """A method that starts an adapter."""

    name: str
    """The method's name in `PissaConfig.init`."""

    is_given: ClassVar[bool] = False
    """Whether the factors come from elsewhere, so that no adapter can start by this method."""

    fields: ClassVar[tuple[str, ...]] = ("seed",)
    """The fields of the configuration that identify a start; see `identity`."""

    reads_weights: ClassVar[bool] = True
    """Whether factors depend on the weights."""

    repairs: ClassVar[bool] = False
    """Whether the method starts from the error of the quantised weight: a residual that no alternation has found then
    lacks nothing of the start, so that it is format(W). The method copies all weights that it is given to float32."""

    def identity(self, config: PissaConfig) -> tuple[tuple[str, Any], ...]:
        """The parts of the configuration that determine the start, besides rank and scaling, as names and values.
        Adapters of a layer with the same identity share their start, and pissa.json records it. Alternations are part
        of it unless the residual lacks another start; they then belong to that one."""
        names = {*self.fields}
        if config.quant_iters > 1 and config.starts_as_base and self.name in ALTERNATING:
            names |= {"quant", "double_quant", "quant_iters"}
        if config.error_feedback and config.starts_as_base:
            names.add("error_feedback")
        return tuple((name, getattr(config, name)) for name in sorted(names))

    @abstractmethod
    def start(self, task: StartTask) -> list[StartFactors]:
        """Returns the start for each weight. Raises the same errors as `start_factors`."""


class Pissa(InitMethod):
    """The leading r singular triplets, by `ops.split_many` (arXiv 2404.02948, eq. 2-3): of W, or, with alternations, of
    W - Q, where the residual Q lacks those of the previous alternation (section 4 there)."""

    name = "pissa"

    def start(self, task: StartTask) -> list[StartFactors]:
        return _split(task, **_alternations(task)) if task.config.quant_iters > 1 else _split(task)


class Activations(InitMethod):
    """The factors that best repair the outputs of a quantised weight: the principal part of W - Q in the norm of the
    second moment of the layer's inputs (QERA, arXiv 2410.06040). Q is format(W) or, with alternations, the residual
    that lacks the factors of the previous one (LoftQ, arXiv 2310.08659)."""

    name = "activations"
    fields = (*Pissa.fields, "quant", "double_quant")
    repairs = True

    def start(self, task: StartTask) -> list[StartFactors]:
        if task.codes is None:
            options = {**_alternations(task), "error_feedback": task.config.error_feedback}
            return _split(task, **options, quantise_first=True, second_moments=task.moments)
        check_weights(task.weights, task.weight_names)
        pairs = zip(task.codes, task.weights, strict=True)
        errors = [ops.dequantize(codes).neg_().add_(weight) for codes, weight in pairs]
        starts = _split(task._replace(weights=errors), second_moments=task.moments)
        recipes = map(empty_factors, task.weights)
        return [
            StartFactors(start.a0, start.b0, start.origin, recipe)
            for start, recipe in zip(starts, recipes, strict=True)
        ]


class Lora(InitMethod):
    """A as in nn.Linear, B = 0 (arXiv 2106.09685). The random factor depends only on the layer's name and the seed."""

    name = "lora"
    reads_weights = False

    def start(self, task: StartTask) -> list[StartFactors]:
        if not task.weights:
            return []
        device = task.device or task.weights[0].device
        in_memory = [pair for pair in zip(task.weights, task.weight_names, strict=True) if not pair[0].is_meta]
        check_weights([weight for weight, _ in in_memory], [name for _, name in in_memory])
        factors = [_draw(task, number) for number in range(len(task.weights))]
        return [
            StartFactors(a0, a0.new_zeros(weight.shape[0], origin.r), origin)
            for a0, weight, origin in zip(_send(factors, device), task.weights, task.origins, strict=True)
        ]


class Given(InitMethod):
    """Not a method: the factors come from other adapters or from a plain LoRA."""

    name = "given"
    is_given = True

    def start(self, task: StartTask) -> list[StartFactors]:
        raise NotImplementedError("an adapter whose factors are given is not started from weights")


INIT_METHODS: dict[str, InitMethod] = {method.name: method for method in (Pissa(), Lora(), Activations(), Given())}
"""The methods that start adapters, by the names that `PissaConfig.init` and `repair` accept. To start adapters in your
own way, add an `InitMethod` under a new name, in every process and before an adapter that it started is loaded."""

PissaConfig.init_methods = INIT_METHODS


def start_factors(task: StartTask) -> list[StartFactors]:
    """Computes the starts of the task's adapters, by the method that `config.init` names, after `config.quant_iters`
    alternations.

    A component that is zero up to roundoff, which could not learn, starts as LoRA's: its row of a0 is random, and its
    column of b0 is 0.

    Raises:
        ValueError: NaN or Inf in a weight, which is named, or no second moments where they are needed.
    """
    if task.config.needs_calibration and task.moments is None:
        raise ValueError(
            "'activations' and error feedback weigh errors by the layers' inputs, which only pissa.wrap and pissa init "
            "look at: give them a calibration"
        )
    method = INIT_METHODS[task.config.init]
    starts = method.start(task)
    empty = _find_empty(starts) if method.reads_weights else {}
    for number, rows in empty.items():
        start = starts[number]
        rows, random = rows.to(start.a0.device), _draw(task, number).to(start.a0.device)
        start.a0, start.b0 = random.where(rows[:, None], start.a0), start.b0.where(~rows, 0)
    return starts


def lacks_start(config: PissaConfig) -> bool:
    """Whether a residual that is stored as `config` says lacks factors, which its adapter adds."""
    method = INIT_METHODS[config.init]
    return method.reads_weights and (not method.repairs or config.quant_iters > 1)


def start_with_codes(task: StartTask) -> tuple[list[StartFactors], list[ops.QuantizedWeight] | None]:
    """Returns the starts that residuals will lack, and the residuals if error feedback finds their codes, else None.

    Raises:
        ValueError: as for `start_factors`.
    """
    config = task.config
    if not config.error_feedback:
        return start_factors(task), None
    if not lacks_start(config):  # the start is that of these codes' error
        codes = _feed_back(task, [empty_factors(weight) for weight in task.weights])
        return start_factors(task._replace(codes=codes)), codes
    starts = start_factors(task)
    return starts, _feed_back(task, [start.removed for start in starts])


def _feed_back(task: StartTask, removed: Sequence[tuple[Tensor, Tensor]]) -> list[ops.QuantizedWeight]:
    """The residuals that lack the removed factors, by error feedback."""
    residuals = ops.residual_many(
        task.weights,
        [a for a, _ in removed],
        [b for _, b in removed],
        [origin.scaling for origin in task.origins],
        names=task.weight_names,
        second_moments=task.moments,
        **task.config.form.options(),
    )
    return [residual for residual in residuals if isinstance(residual, ops.QuantizedWeight)]


def _alternations(task: StartTask) -> dict[str, Any]:
    """The configuration's alternations, at least one, as `ops.split_many` takes them."""
    return {**task.config.form.options(), "quant_iters": task.config.quant_iters}


def _split(task: StartTask, **options: Any) -> list[StartFactors]:
    """The starts that `ops.split_many` computes with these options."""
    config = task.config
    splits = ops.split_many(
        task.weights,
        [origin.r for origin in task.origins],
        [origin.scaling for origin in task.origins],
        seed=config.seed,
        names=task.weight_names,
        **options,
    )
    return [
        StartFactors(split.a0, split.b0, origin, split.taken)
        for split, origin in zip(splits, task.origins, strict=True)
    ]


def _send(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copies CPU tensors to a device. They are sent in one copy, since the host waits for the GPU at each copy."""
    if device.type == "cpu":
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).clone() for part, tensor in zip(parts, tensors, strict=True)]


def _draw(task: StartTask, number: int) -> Tensor:
    """LoRA's random factor for the weight of that number, float32 [r, in] on the CPU. It depends only on the layer's
    name and the seed."""
    columns = task.weights[number].shape[1]
    generator = torch.Generator().manual_seed(zlib.crc32(task.names[number].encode()) ^ task.config.seed)
    bound = 1 / math.sqrt(columns)  # kaiming_uniform_(a=sqrt(5)), nn.Linear's
    uniform = torch.rand(task.origins[number].r, columns, generator=generator, dtype=torch.float32)
    return (2 * uniform - 1) * bound


def _find_empty(starts: Sequence[StartFactors]) -> dict[int, Tensor]:
    """The components of starts whose row of a0 and column of b0 are both zero up to the roundoff of an SVD, bool [r] on
    the CPU, by the number of the start. The host waits for a GPU once."""
    flags = []
    for start in starts:
        # A singular value is the product of the two lengths, which are alike.
        bound = math.sqrt(torch.finfo(torch.float32).eps * math.sqrt(max(len(start.b0), start.a0.shape[1])))
        lengths = [torch.linalg.vector_norm(part, dim=1) for part in (start.a0, start.b0.mT)]
        flags.append(torch.stack([length <= bound * length.max() for length in lengths]).all(0))
    rows = torch.split(torch.cat(flags).cpu(), list(map(len, flags))) if flags else ()
    return {number: empty for number, empty in enumerate(rows) if empty.any()}

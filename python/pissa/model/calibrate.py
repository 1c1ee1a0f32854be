"""calibrate: measures what a model's layers read, as the second moment of each layer's inputs.

Padding never enters the model: a batch is cut at its attention mask, and rows of the same length run together.
Therefore experts do not see padding either, although their inputs do not show which token they belong to.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from pissa import ops
from pissa.base.classes import evaluating
from pissa.config import PissaConfig
from pissa.layers.layer import pissa_layers
from pissa.layers.modules import PissaLinear
from pissa.model.blocks import run_block_by_block
from pissa.model.calibration import Calibration
from pissa.model.inject import check_plain, own_config, way_back
from pissa.model.pissa_model import model_class
from pissa.notices import UncalibratedWarning
from pissa.ops.formats import FORMATS

Batch = Mapping[str, Any] | Tensor
"""Arguments of the model without labels, or only input_ids."""

_MASK = "attention_mask"
_NEEDLESS = {"use_cache": False, "logits_to_keep": torch.tensor([-1])}
"""Arguments of transformers' models that avoid computing what no layer reads: cached keys, and logits. (For the number
of logits, 1, Gemma 4 computes its last blocks only for the last token.)"""


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PissaConfig | None = None,
    *,
    diagonal: bool = False,
    progressbar: bool = False,
    **config_fields: Any,
) -> Calibration:
    """Computes the second moments R = E[xᵀx] of what the linear layers of a model read, for `pissa.wrap`. `pissa.wrap`
    also takes batches directly; use this function to use the moments more than once::

        calibration = pissa.calibrate(model, batches)
        model = pissa.wrap(model, quant="nf4", repair="activations", calibration=calibration)

    The model only runs forward and is left as it was. R takes 4 in² bytes for each group of layers that share their
    inputs (four groups in a Llama block: 0.7 GB in each block of a 7B model, 22 GB in total), on the device where the
    layers compute. Sums are float32, in the order of the batches, and have the same bits for any number of threads.
    With several processes, all of them must give the same batches.

    Args:
        model: the model before it is wrapped.
        batches: mappings of the model's arguments, as a tokenizer or a data loader returns them ("labels" is left out),
            or tensors of input_ids [rows, tokens]. Positions where attention_mask [rows, tokens] is 0 are not counted.
            The ones of a row must be contiguous.
        config, config_fields: as for `pissa.wrap`; only the targeted layers matter.
        diagonal: compute only R's diagonal, E[x²] of each input. It takes 4 in bytes and less work. The repair then
            removes less of the error. Error feedback needs all of R.
        progressbar: show one bar on stderr.

    Raises:
        TypeError, ValueError: as for `pissa.wrap`; also for a batch that is neither a mapping nor a tensor, a mask with
            holes, NaN or Inf in an input, or no batch. The model is left as it was.
    """
    restore = way_back(model)
    try:
        config = own_config(PissaConfig(**config_fields) if config is None else config)
        check_plain(model, "default")
        return observe(model_class(config)(model, config, "default"), batches, progressbar, diagonal=diagonal)
    finally:
        restore()


def check_wanted(config: PissaConfig, calibration: object) -> None:
    """Checks that a calibration is given where a configuration needs one, and only there.

    Raises:
        ValueError: a calibration is missing or unused.
    """
    if config.needs_calibration and calibration is None:
        wanted = "error_feedback=True" if config.error_feedback else "init or repair 'activations'"
        raise ValueError(
            f"calibration: got None; {wanted} weighs errors by the layers' inputs: give pissa.wrap or pissa init "
            "batches of what the model will read, as pissa.calibrate takes them"
        )
    if calibration is not None and not config.needs_calibration:
        raise ValueError(
            'calibration: got one that nothing uses; give quant, and repair="activations" or error_feedback=True, with '
            "it, or leave it out"
        )
    if config.error_feedback and isinstance(calibration, Calibration) and calibration.diagonal:
        raise ValueError(
            "calibration: got diagonals; error_feedback=True needs all of R: calibrate without diagonal=True"
        )
    if calibration is None and config.quant is not None and FORMATS[config.quant].bits < 4:
        warnings.warn(
            f'quant="{config.quant}" without a calibration loses most of what the model knows. Give '
            'repair="activations", error_feedback=True and calibration=batches with it.',
            UncalibratedWarning,
            stacklevel=3,  # the caller of pissa.wrap
        )


@torch.no_grad()
def observe(wrapped: PeftModel, batches: Iterable[Batch], progressbar: bool, *, diagonal: bool = False) -> Calibration:
    """Calibrates the adapted linear layers of a model. The adapter may still lack its start."""
    layers = _linear_layers(wrapped)
    with (
        _observing(wrapped, layers, _Observer(diagonal)) as observer,
        tqdm(desc="Calibration", unit="batch") if progressbar else nullcontext() as bar,
    ):
        for batch in batches:
            for call in _calls(wrapped, batch):
                wrapped.base_model.model(**call)
                observer.forget()
            if bar is not None:
                bar.update()
        return observer.calibration(layers)


def observe_blocks(wrapped: PeftModel, batches: Iterable[Batch]) -> Generator[Calibration, None, None]:
    """Like `observe`, but block by block: only one block's calibration is in memory, together with the batches at that
    block. Yields one calibration of all layers where `run_block_by_block` goes through the whole model."""
    layers = _linear_layers(wrapped)
    calls = [call for batch in batches for call in _calls(wrapped, batch)]
    with _observing(wrapped, layers, _Observer()) as observer:
        for block in run_block_by_block(wrapped.base_model.model, layers, calls, observer.clear):
            if here := [name for name in layers if name.startswith(block)]:
                yield observer.calibration(here)
                observer.clear()


def _linear_layers(wrapped: PeftModel) -> list[str]:
    return [name for name, layer in pissa_layers(wrapped.base_model.model).items() if isinstance(layer, PissaLinear)]


@contextmanager
def _observing(wrapped: PeftModel, layers: Iterable[str], observer: _Observer) -> Iterator[_Observer]:
    """Lets an observer see the inputs of layers, while the model is in evaluation mode and without its adapters."""
    base = wrapped.base_model.model
    hooks = [
        base.get_submodule(name).register_forward_pre_hook(observer.hook(name), with_kwargs=True) for name in layers
    ]
    training = {module: module.training for module in base.modules()}
    frozen = [parameter for parameter in base.parameters() if not parameter.requires_grad]
    wrapped.base_model.disable_adapter_layers()
    try:
        evaluating(base)
        yield observer
    finally:
        wrapped.base_model.enable_adapter_layers()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for hook in hooks:
            hook.remove()
        for module, was_training in training.items():
            module.training = was_training


class _Observer:
    """Adds up the second moments of the inputs of layers, once for all layers that are given the same tensor."""

    def __init__(self, diagonal: bool = False) -> None:
        self._diagonal = diagonal
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._leaders: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None

    def hook(self, name: str) -> Any:
        """The forward pre-hook of the layer with that name."""
        return lambda _, args, kwargs: self._add(name, args[0] if args else kwargs["input"])

    def _add(self, name: str, x: Tensor) -> None:
        shared = self._last is not None and self._last[0] is x
        leader = self._last[1] if shared and self._last is not None else name
        if self._leaders.setdefault(name, leader) != leader:
            raise ValueError(f"layer {name}: has the inputs of {self._leaders[name]} in one batch but not in another")
        if shared:
            return
        self._last = x, name
        if name not in self._sums:
            shape = x.shape[-1:] if self._diagonal else (x.shape[-1], x.shape[-1])
            self._sums[name] = torch.zeros(shape, dtype=torch.float32, device=x.device)
            self._tokens[name] = 0
        if self._diagonal:
            self._sums[name] += x.flatten(0, -2).float().square().sum(0)
        else:
            ops.add_second_moment(self._sums[name], x)
        self._tokens[name] += x.numel() // x.shape[-1]

    def clear(self) -> None:
        """Discards the sums."""
        self._sums, self._tokens, self._leaders = {}, {}, {}
        self.forget()

    def forget(self) -> None:
        """Called at the end of a forward pass, because a later tensor may have the address of an earlier one."""
        self._last = None

    def calibration(self, names: Iterable[str]) -> Calibration:
        """Returns the means for these layers. An expert that received no token gets the mean of its siblings' inputs.

        Raises:
            ValueError: nothing was added up, or a sum is not finite. The message names the layer.
        """
        if not self._sums:
            raise ValueError("calibration: got no batch with tokens; give batches of what the model will read")
        means: dict[str, Tensor] = {}
        for name in list(self._sums):
            total = self._sums.pop(name)  # keeping a model's sums together with its means would double the memory
            if not self._diagonal:
                total = total.tril_() + total.tril(-1).mT
            means[name] = total / max(self._tokens[name], 1)
            if not bool(torch.isfinite(means[name]).all()):
                raise ValueError(f"layer {name}: NaN or Inf in its inputs; calibrate in float32, or with other batches")
        found: dict[str, Tensor] = {}
        for name in names:
            if name in self._leaders:
                found[name] = means[self._leaders[name]]
                continue
            siblings = [other for other in means if _of_experts(other) == _of_experts(name) is not None]
            if not siblings:
                raise ValueError(f"layer {name}: no batch has reached it; leave it out with exclude_modules")
            tokens = sum(self._tokens[other] for other in siblings)
            found[name] = sum((means[other] * (self._tokens[other] / tokens) for other in siblings), torch.zeros(()))
        return Calibration(found, max(self._tokens.values()))


def _of_experts(name: str) -> tuple[str, str] | None:
    """The common part of the names of the experts' layers that do the same part of the work; None for other layers."""
    found = re.fullmatch(r"(.*experts)\.\d+\.(.*)", name)
    return None if found is None else (found[1], found[2])


def _calls(wrapped: PeftModel, batch: Batch) -> Iterator[dict[str, Any]]:
    """Yields the arguments with which the model reads a batch. Each part contains rows of one length, from the first to
    the last token of the mask.

    Raises:
        TypeError: the batch is neither a mapping nor a tensor.
        ValueError: the mask has holes.
    """
    base = wrapped.base_model.model
    known, device = inspect.signature(base.forward).parameters, next(base.parameters()).device
    needless = {name: value for name, value in _NEEDLESS.items() if name in known}
    for part in _without_padding(batch):
        if device.type != "meta":  # accelerate moves the inputs of a model that it offloads
            part = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in part.items()}
        yield part | needless


def _without_padding(batch: Batch) -> Iterator[dict[str, Any]]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"calibration: got a batch of {type(batch).__name__}; needed: a mapping, or input_ids")
    arguments = {name: value for name, value in batch.items() if name != "labels"}
    mask = arguments.get(_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        yield arguments
        return
    there = mask.bool().cpu()
    lengths, firsts = there.sum(1), there.int().argmax(1)
    spans: dict[tuple[int, int], list[int]] = {}
    for row, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True)):
        if not bool(there[row, first : first + length].all()):
            raise ValueError(
                f"calibration: row {row} of {_MASK} has zeros between ones; needed: ones that stand together"
            )
        if length:
            spans.setdefault((first, length), []).append(row)
    for (first, length), rows in spans.items():
        yield {name: _rows(value, rows, slice(first, first + length), mask.shape) for name, value in arguments.items()}


def _rows(value: Any, rows: list[int], span: slice, shape: torch.Size) -> Any:
    if not isinstance(value, Tensor) or value.shape[:1] != shape[:1]:
        return value
    return value[rows, span] if value.shape[:2] == shape else value[rows]

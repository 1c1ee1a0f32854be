"""calibrate: measures what a model's layers read, as the second moment of each layer's inputs."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from pissa import ops
from pissa.base.classes import evaluation_mode
from pissa.config import PissaConfig
from pissa.distributed import world_size
from pissa.layers.layer import pissa_layers
from pissa.layers.modules import PissaLinear
from pissa.model.batches import Batch, calls_of
from pissa.model.blocks import run_block_by_block
from pissa.model.calibration import Calibration, SecondMoments
from pissa.model.inject import check_plain, own_config, way_back
from pissa.model.pissa_model import model_class


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PissaConfig | None = None,
    *,
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
        progressbar: show one bar on stderr.

    Raises:
        TypeError, ValueError: as for `pissa.wrap`; also for a batch that is neither a mapping nor a tensor, a mask with
            holes, NaN or Inf in an input, or no batch. The model is left as it was.
    """
    restore = way_back(model)
    try:
        config = own_config(PissaConfig(**config_fields) if config is None else config)
        check_plain(model, "default")
        return observe(model_class(config)(model, config, "default"), batches, progressbar)
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
            "batches of what the model will read, as pissa.calibrate takes them [P033]"
        )
    if calibration is not None and not config.needs_calibration:
        raise ValueError(
            'calibration: got one that nothing uses; give quant, and repair="activations" or error_feedback=True, with '
            "it, or leave it out"
        )


def use_calibration(config: PissaConfig, calibration: object) -> None:
    """Lets the base be repaired if a calibration is given that nothing else would use.

    Raises:
        ValueError: as `check_wanted`.
    """
    is_used = config.needs_calibration or config.repair is not None
    if calibration is not None and config.quant is not None and not is_used:
        config.repair = "activations"  # recovers three quarters of what QLoRA loses to 16 bits (bench/experiments)
    check_wanted(config, calibration)


@contextmanager
def moments_of(
    wrapped: PeftModel, config: PissaConfig, calibration: Calibration | Iterable[Batch] | None, progressbar: bool
) -> Iterator[SecondMoments | None]:
    """What a calibration says of the inputs of a model whose only adapter is to be started in the block: moments that
    are known already, or those of batches, if possible those of one block of the model at a time."""
    if calibration is None or isinstance(calibration, Calibration):
        yield calibration
    elif world_size() > 1 or (config.init == "activations" and not config.starts_as_base):  # are asked for twice
        yield observe(wrapped, calibration, progressbar)
    else:
        with closing(BlockMoments(wrapped, calibration, pissa_layers(wrapped.base_model.model))) as moments:
            yield moments


@torch.no_grad()
def observe(wrapped: PeftModel, batches: Iterable[Batch], progressbar: bool) -> Calibration:
    """Calibrates the adapted linear layers of a model. The adapter may still lack its start."""
    model = wrapped.base_model.model
    with _observe_inputs(wrapped) as observer:
        for batch in tqdm(batches, desc="Calibration", unit="batch") if progressbar else batches:
            for call in calls_of(model, batch):
                model(**call)
                observer.forget()
        return observer.calibration(observer.layers)


def observe_blocks(wrapped: PeftModel, batches: Iterable[Batch]) -> Generator[Calibration, None, None]:
    """Like `observe`, but block by block: only one block's calibration is in memory, together with the batches at that
    block. Yields one calibration of all layers where `run_block_by_block` goes through the whole model."""
    model = wrapped.base_model.model
    calls = [call for batch in batches for call in calls_of(model, batch)]
    with _observe_inputs(wrapped) as observer:
        for block in run_block_by_block(model, observer.layers, calls, observer.clear):
            if in_block := [name for name in observer.layers if name.startswith(block)]:
                yield observer.calibration(in_block)
                observer.clear()


class BlockMoments:
    """The second moments of the inputs of a model's layers, as in `Calibration`. They are computed in the order of the
    blocks, and wait in memory until they are requested. Each may be requested once.

    Args:
        wrapped: the model. Its adapter may still lack its start. Its layers must stay as they are until `close`.
        batches: the model's inputs, as `calibrate` takes them.
        wanted: the names of the layers that will be requested.
    """

    def __init__(self, wrapped: PeftModel, batches: Iterable[Batch], wanted: Iterable[str]) -> None:
        self._blocks = observe_blocks(wrapped, batches)
        self._waiting: dict[str, Tensor] = {}
        self._wanted = set(wanted)

    def of(self, names: Iterable[str], device: torch.device) -> list[Tensor]:
        """Returns the moments of these layers, [in, in], on a device.

        Raises:
            ValueError: `calibrate` would refuse the model or the batches, or a layer is not linear.
        """
        names = list(names)
        while lacking := [name for name in names if name not in self._waiting]:
            if (block := next(self._blocks, None)) is None:
                raise ValueError(f"calibration: has no layer {lacking[0]}; leave it out with exclude_modules")
            self._waiting |= {name: moment for name, moment in block.moments.items() if name in self._wanted}
            del block
        return [self._waiting.pop(name).to(device) for name in names]

    def close(self) -> None:
        """Ends the passes through the model, wherever they are."""
        self._blocks.close()


@contextmanager
def _observe_inputs(wrapped: PeftModel) -> Iterator[_Observer]:
    """Observes the inputs of the adapted linear layers, while the model is in evaluation mode and without its
    adapters."""
    model = wrapped.base_model.model
    linears = {name: layer for name, layer in pissa_layers(model).items() if isinstance(layer, PissaLinear)}
    observer = _Observer(list(linears))
    hooks = [layer.register_forward_pre_hook(observer.hook(name), with_kwargs=True) for name, layer in linears.items()]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    wrapped.base_model.disable_adapter_layers()
    try:
        with evaluation_mode(model):
            yield observer
    finally:
        wrapped.base_model.enable_adapter_layers()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for hook in hooks:
            hook.remove()


class _Observer:
    """Adds up the second moments of the inputs of layers, once for all layers that are given the same tensor."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._leaders: dict[str, str] = {}
        """For each layer, the first one that was given the same tensors, which has their sum."""
        self._last: Tensor | None = None
        """The last input."""
        self._leader = ""
        """The first layer that was given it."""

    def hook(self, name: str) -> Any:
        """The forward pre-hook of the layer with that name."""
        return lambda _, args, kwargs: self._add(name, args[0] if args else kwargs["input"])

    def _add(self, name: str, x: Tensor) -> None:
        is_shared = x is self._last
        if not is_shared:
            self._last, self._leader = x, name
        if self._leaders.setdefault(name, self._leader) != self._leader:
            raise ValueError(f"layer {name}: has the inputs of {self._leaders[name]} in one batch but not in another")
        if is_shared:
            return
        if name not in self._sums:
            self._sums[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
            self._tokens[name] = 0
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
            total = total.tril_() + total.tril(-1).mT
            means[name] = total / max(self._tokens[name], 1)
            if not bool(torch.isfinite(means[name]).all()):
                raise ValueError(f"layer {name}: NaN or Inf in its inputs; calibrate in float32, or with other batches")
        moments: dict[str, Tensor] = {}
        for name in names:
            if name in self._leaders:
                moments[name] = means[self._leaders[name]]
                continue
            siblings = [other for other in means if _of_experts(other) == _of_experts(name) is not None]
            if not siblings:
                raise ValueError(f"layer {name}: no batch has reached it; leave it out with exclude_modules [P034]")
            tokens = sum(self._tokens[other] for other in siblings)
            moments[name] = sum((means[other] * (self._tokens[other] / tokens) for other in siblings), torch.zeros(()))
        return Calibration(moments, max(self._tokens.values()))


def _of_experts(name: str) -> tuple[str, str] | None:
    """The common part of the names of the experts' layers that do the same part of the work; None for other layers."""
    match = re.fullmatch(r"(.*experts)\.\d+\.(.*)", name)
    return None if match is None else (match[1], match[2])

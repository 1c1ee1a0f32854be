"""load: a PissaModel over a folder. Nothing that is split there is decomposed again. transformers' own loader gets
tensors that nothing has read yet, and leaves the packed ones packed and those that will be quantised on the disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.quantizers import register_quantization_config
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from pissa import ops
from pissa.adapters.lora_folder import INITIAL_WEIGHTS
from pissa.adapters.peft_layout import factors_of
from pissa.adapters.pissa_layout import ADAPTER_FILES, PISSA_WEIGHTS, AdapterRecord, PissaFolder
from pissa.adapters.restore import base_doubts, restore
from pissa.base.bitsandbytes import linear4bit
from pissa.base.classes import base_of, is_linear
from pissa.base.digest import Match, dtype_of, is_fingerprint, match
from pissa.base.protocol import Base
from pissa.base.start import StartFactors
from pissa.base.stored import residual_tensors
from pissa.base.weights import CodedEmbedding, CodedLinear
from pissa.checkpoints.unread import Parameters, Reader, leave_parameters, tensors_of, to_replace
from pissa.config import IMPLICIT, PissaConfig
from pissa.containers.checkpoint import AS_STORED, EXPERT, PISSA_RECORD, RESIDUAL_KEY, Checkpoint, Contents
from pissa.containers.coded_weights import BitsandbytesWeight
from pissa.containers.hub import Name, adapter_folder
from pissa.containers.messages import file_errors, quote
from pissa.containers.model_folder import NO_MODEL, Part, class_of
from pissa.containers.tensor_file import TensorFile
from pissa.distributed import failing_together
from pissa.layers.experts import UnfusedExperts
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.model.batches import Batch
from pissa.model.calibrate import moments_of, use_calibration
from pissa.model.calibration import Calibration
from pissa.model.decompose import decompose
from pissa.model.inject import check_adapter_name, materialise, own_config
from pissa.model.pissa_model import PissaModel, fuse_steps, model_class
from pissa.model.store import store


@contextmanager
def of_layer(name: str, folder: Path | None = None) -> Iterator[None]:
    """Adds the layer, and the folder of its model, to a ValueError in the block."""
    place = "" if folder is None else f"{folder}: "
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}layer {quote(name)}: {error}") from error


def mapped_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None, unread: Parameters = MappingProxyType({})
) -> PreTrainedModel:
    """The model of a checkpoint, on the CPU, in evaluation mode. Its tensors are views of the mapped files. Only
    tensors that transformers has cast (to `dtype`, or to that of the folder's config.json) or assembled from several
    are copies. Parameters that are stored in codes stay on the meta device; see `Checkpoint.coded_parameters`. So do
    those in `unread`."""
    folder = checkpoint.folder
    left = checkpoint.coded.keys() | tensors_of(unread)
    state: dict[str, Any] = {name: checkpoint.read(name) for name in checkpoint.names if name not in left}
    config = checkpoint.built_config()
    transformers_class = class_of(config)
    vars(config).pop("quantization_config", None)
    vars(config).pop(RESIDUAL_KEY, None)  # of a base that is complete once it has its start
    for name, layers in checkpoint.coded_parameters.items():
        shapes = [checkpoint.codes(parts).shape for parts in layers.values()]
        is_one = list(layers) == [name.removesuffix(".weight")]
        state[name] = _LeftAlone(shapes[0] if is_one else checkpoint.tensors[name].shape)
    state |= {name: _LeftAlone(checkpoint.tensors[name].shape) for name in unread}
    with file_errors(folder, NO_MODEL):
        described = checkpoint.described
        has_own = (described / GENERATION_CONFIG_NAME).is_file()
        generation = GenerationConfig.from_pretrained(described) if has_own else None
        with _unpartitioned() if left else nullcontext():
            model, info = transformers_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype or "auto",
                generation_config=generation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of a {transformers_class.__name__}, {quote(missing[0])} the first"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, given, needed = mismatched[0]
        raise ValueError(f"{folder}: {quote(name)} is {list(given)} in the folder and {list(needed)} in the model")
    return model


@contextmanager
def _unpartitioned() -> Iterator[None]:
    """Hides DeepSpeed's ZeRO-3 from transformers' loader, which would partition weights that do not exist yet."""
    config = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


class _LeftAlone:
    """Represents in a state dict a parameter that is not read. transformers' loader slices what it is given, and moves
    it to a device and a dtype. From this object it gets a parameter on the meta device."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape

    def __getitem__(self, _: object) -> _LeftAlone:
        return self

    def to(self, device: object, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.shape, dtype=dtype, device="meta"))


@register_quantization_config("pissa")
class _ReadByLoad(QuantizationConfigMixin):  # type: ignore[misc]
    """Refuses a model with quantised experts, which transformers would treat as missing and initialise at random."""

    def __init__(self, **_: Any) -> None:
        raise ValueError("the experts are quantised, which pissa.load(folder) reads, not from_pretrained [P090]")


def load(
    folder: Name,
    config: PissaConfig | None = None,
    *,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    calibration: Calibration | Iterable[Batch] | None = None,
    is_trainable: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    fuse: bool = True,
    precision: str = "float",
    config_from: Name | None = None,
    **config_fields: Any,
) -> PissaModel:
    """Returns a PissaModel over the mapped files of a folder. Weights that are packed there, or that it quantises, are
    never dense in memory, except a few at a time::

        model = pissa.load("16bit", r=16, quant="nf4")  # the model of pissa.wrap, bit for bit, in less memory
        model = pissa.load("out")  # what `pissa init` wrote
        model = pissa.load("out", adapter="run")  # with an adapter trained on it
        model = pissa.load("4bit", r=16, task_type="CAUSAL_LM")  # nf4, saved by transformers
        model = pissa.load("openai/gpt-oss-20b", r=16, init="lora")  # as it was released
        model = pissa.load("model-Q4_K_M.gguf", r=16, init="lora")  # of llama.cpp, Ollama, LM Studio

    For a folder of `pissa init`, nothing is decomposed: the model is the one that `pissa.wrap` makes of the dense
    checkpoint, bit for bit. Any other folder is loaded and wrapped: packed weights are decoded, decomposed and freed
    one by one, or, for LoRA's start, not even decoded. docs/released-models.md lists what is read. Dense weights that
    `quant` or residual="explicit" replaces are read where they are decomposed, and again where they are replaced.

    The files must not change while the model is used, unless it is quantised, which copies what it keeps. Their pages
    in memory are the system's cache, and other programs can reclaim that memory.

    Args:
        folder: a folder of safetensors with config.json, a GGUF file, or the name of one on the Hub, which is
            downloaded first: org/name, or org/name-GGUF:Q4_K_M as llama.cpp writes it.
        config: the configuration, copied; alternatively its fields as keywords. The default for a folder of `pissa
            init` is its own. Another start or rank may be asked for there, but not another form of the base.
        revision: the branch, tag or commit of a model on the Hub.
        adapter: a folder that `save_pretrained` wrote for such a model, or a repository on the Hub. It has its own
            configuration.
        calibration: see `wrap`. The model then runs over its mapped files.
        is_trainable: False freezes the adapter.
        device: the device of the model.
        dtype: dtype of the tensors that are not packed (default: the folder's own).
        adapter_name: name of the adapter.
        progressbar: show a bar on stderr while weights are decomposed.
        fuse: see `wrap`.
        precision: see `wrap`.
        config_from: the folder or name of a model whose config.json and tokenizer are taken for that in a GGUF file,
            instead of what its metadata say.
        config_fields: fields of `PissaConfig`, instead of `config`.

    Raises:
        ValueError: the folder is damaged, or does not fit the adapter or the configuration (the message names file,
            tensor or layer); also as for `wrap`.
        TypeError: more than one of adapter, config and fields is given, or a layer cannot be adapted.
        pissa.RankError: another process has failed.
    """
    with failing_together():
        checkpoint = Checkpoint.open(folder, revision, config_from=config_from)
        folder = checkpoint.folder
        checkpoint.require(Contents.DENSE, *AS_STORED, Contents.BITSANDBYTES, Contents.RESIDUAL)
        if checkpoint.quantization.get("transform_config"):
            raise ValueError(f"{folder} turns its layers' inputs (transform_config in config.json), which is not read")
        is_residual = checkpoint.contents is Contents.RESIDUAL
        split = AdapterRecord.read(folder / PISSA_RECORD) if is_residual else None
        saved = None if adapter is None else PissaFolder.open(adapter_folder(adapter, ADAPTER_FILES))
        blame: Callable[[], AbstractContextManager[None]] = nullcontext if saved is None else saved.blame
        config = _config(config, config_fields, folder, split, saved)
        config.inference_mode = not is_trainable
        if calibration is not None and (saved or split):
            owner = folder if saved is None else saved.path
            raise ValueError(f"calibration: got one, and the start and the codes of {owner} are known: leave it out")
        if saved is None and split is None:
            use_calibration(config, calibration)
        unread, reader = {} if split is not None else to_replace(checkpoint, config), Reader(checkpoint)
        model = mapped_model(checkpoint, dtype, unread)
        check_adapter_name(adapter_name, model)
        if config.task_type is None and type(model).__name__.endswith("ForCausalLM"):
            config.task_type = "CAUSAL_LM"
        # The model card names the model for which the plain LoRA is: the dense model that was split.
        config.base_model_name_or_path = config.base_model_name_or_path or checkpoint.name
        model.config._name_or_path = model.name_or_path = config.base_model_name_or_path
        with blame():
            wrapped = model_class(config)(model, config, adapter_name)
        wrapped.is_from_files = True
        if split is None:
            _fill_packed(model, checkpoint)
            leave_parameters(model, reader, unread, torch.device(device))
        else:
            _fill_split(model, checkpoint, split, config)
        materialise(model, adapter_name)
        wrapped._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        left = {}
        if saved is None:
            more = {"progressbar": progressbar, "keep_bases": split is not None}
            with moments_of(wrapped, config, calibration, progressbar) as moments:
                left = decompose(model, adapter_name, config, calibration=moments, **more)
        else:
            with blame():
                restore(saved, wrapped, adapter_name)
    store(model, adapter_name, config, left)  # it reports its errors to the other processes itself
    reader.close()
    if fuse:
        fuse_steps(wrapped)
    wrapped.precision = precision
    return wrapped if is_trainable else wrapped.eval()


def _config(
    config: PissaConfig | None,
    fields: Mapping[str, Any],
    folder: Path,
    split: AdapterRecord | None,
    saved: PissaFolder | None,
) -> PissaConfig:
    """The configuration of the adapter. `split` is the record of a folder that `pissa init` has written."""
    sources = {"config": config is not None, "its fields": bool(fields), "adapter": saved is not None}
    if sum(sources.values()) > 1:
        raise TypeError(f"give config, its fields or adapter, got {' and '.join(filter(sources.get, sources))} [P091]")
    if saved is not None:
        return saved.config
    if split is not None and config is None and not fields:
        return own_config(split.config)
    config = own_config(PissaConfig(**fields) if config is None else config)
    config.base_model_name_or_path = None
    if split is not None:
        form = split.config.form
        if config.form not in (IMPLICIT, form):
            raise ValueError(
                f"the residuals of {folder} are {form.describe()} and cannot become {config.form.describe()}: leave "
                "quant, double_quant and residual out [P091]"
            )
        config.base_model_name_or_path = split.config.base_model_name_or_path
    return config


def _fill_packed(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Gives an adapted, unwrapped model the weights that are stored in codes."""
    name = str(checkpoint.quantization.get("bnb_4bit_compute_dtype") or "float32")
    compute_dtype = getattr(torch, name, None)
    if not isinstance(compute_dtype, torch.dtype) or not compute_dtype.is_floating_point:
        raise ValueError(f"config.json: bnb_4bit_compute_dtype is {quote(name)}; needed: float32, bfloat16 or float16")
    coded = checkpoint.coded_layers
    for path, name in {match.groups() for layer in coded if (match := EXPERT.fullmatch(layer))}:
        if getattr(fused := model.get_submodule(path), name, None) is not None:
            model.set_submodule(path, UnfusedExperts(fused))  # nothing adapts them, but they can compute only so
    for layer, parts in coded.items():
        parameter, weight = f"{layer}.weight", None
        tied = checkpoint.tied(parameter) if parameter in checkpoint.tensors else []
        for path in (layer, *(name.removesuffix(".weight") for name in tied)):
            module = model.get_submodule(path)
            if isinstance(module, AuxiliaryTrainingWrapper):
                raise ValueError(
                    f"layer {quote(path)} is in codes, and modules_to_save and trainable_token_indices train a dense "
                    "weight: adapt it (target_modules) instead, or load a dense model [P135]"
                )
            adapted = module if isinstance(module, PissaLayer) else None
            dense = base_of(module) if adapted is None else adapted.base
            base = _packed_base(dense, checkpoint, parts, compute_dtype, path)
            if base is None:
                continue
            if weight is not None:
                base.weight = weight
            weight = base.weight
            base.train(dense.module.training)
            if adapted is not None:
                adapted.base_layer = base
            else:
                model.set_submodule(path, base)


def _packed_base(
    dense: Base, checkpoint: Checkpoint, parts: Sequence[Part], compute_dtype: torch.dtype, name: str
) -> CodedLinear | CodedEmbedding | None:
    """The base over the codes of a layer; None for a module that only computes from a dense weight, which it gets."""
    coded = checkpoint.coded[parts[0].tensor]
    if dense.module_class is nn.Embedding:
        return CodedEmbedding(checkpoint.codes(parts), dense.module)
    if dense.module_class is not nn.Linear or not is_linear(dense.module):  # DeepSeek-V4 has a grouped one
        decoded = ops.dequantize(checkpoint.codes(parts), dense.parameter.dtype)
        dense.module.register_parameter("weight", nn.Parameter(decoded, requires_grad=False))
        return None
    if not isinstance(coded, BitsandbytesWeight):
        return CodedLinear(checkpoint.codes(parts), dense.bias)
    with of_layer(name):
        if "SCB" in (entries := coded.entries()):
            raise ValueError(
                "its weight is in 8 bits, with which only bitsandbytes computes: "
                "pissa.wrap(AutoModelForCausalLM.from_pretrained(folder), ...) [P090]"
            )
        return linear4bit(entries, dense.bias, compute_dtype)


def _fill_split(model: nn.Module, checkpoint: Checkpoint, split: AdapterRecord, config: PissaConfig) -> None:
    """Puts a stored base, with the start that it lacks, into every layer of the folder's record. Residuals that are not
    in codes are the model's weights. Each residual and its start are compared with their fingerprints. This reads a
    residual's pages once, as the first training step would."""
    folder, adapted, records = checkpoint.folder, pissa_layers(model), split.layers
    coded = checkpoint.coded_layers
    for name in [*records, *coded]:
        if name not in records:
            raise ValueError(f"{folder / PISSA_RECORD} has no layer {quote(name)}, whose weight is packed")
        if name not in adapted:
            raise ValueError(
                f"layer {quote(name)} has no adapter, but {folder} keeps a residual of it, which lacks its principal "
                "part: include it in target_modules, as the default configuration does [P091]"
            )
    layers = {name: layer for name, layer in adapted.items() if name in records}
    starts = _starts(model, layers, folder, split)
    narrower = {}
    for name, layer in layers.items():
        record, start = records[name], starts[name]
        parts = coded.get(name)
        residual = layer.base.matrix().detach().contiguous() if parts is None else checkpoint.codes(parts)
        with of_layer(name):
            if tuple(residual.shape) != layer.matrix_shape:
                raise ValueError(
                    f"its weight is {list(residual.shape)} in the folder and {list(layer.matrix_shape)} in the model"
                )
            comparison = match(record.stored, *residual_tensors(residual).values())
            if comparison is Match.OTHER:
                raise ValueError(
                    f"its residual does not have the fingerprint in {folder / PISSA_RECORD}: a file is "
                    "damaged, or belongs to another folder [P091]"
                )
            if not is_fingerprint(record.start, *start.known_by):
                files = [INITIAL_WEIGHTS, *([PISSA_WEIGHTS] if record.recipe is not None else [])]
                raise ValueError(
                    f"its start factors do not have the fingerprint in {folder / PISSA_RECORD}: "
                    f"{' or '.join(str(folder / file) for file in files)} is damaged, or belongs to another folder; "
                    "take it from a copy, or split the model again [P091]"
                )
        layer.weight_fingerprint.remember(layer.base, record.weight)
        layer.store_base(residual, start, config)
        layer.base_layer.is_in_checkpoint = True
        if comparison is Match.ROUNDED:
            narrower[name] = layer.dense_dtype, dtype_of(str(record.stored))
        else:
            layer.residual_fingerprint.remember(layer.base, str(record.stored))
    for doubt in base_doubts(folder, narrower, ()):
        warnings.warn(doubt, stacklevel=3)  # the caller of load


def _starts(
    model: nn.Module, layers: Mapping[str, PissaLayer], folder: Path, split: AdapterRecord
) -> dict[str, StartFactors]:
    """The start factors of the layers, with those that their residuals lack if alternations have found others."""
    factors = TensorFile(folder / INITIAL_WEIGHTS)
    has_recipes = any(record.recipe is not None for record in split.layers.values())
    others = TensorFile(folder / PISSA_WEIGHTS) if has_recipes else factors
    config = split.config.of_base()
    starts = {}
    for part in factors_of(model, layers):
        for key, shape in part.shapes(split.layers[part.layers[0]].r).items():
            factors.expect(key, shape, (torch.float32,), f"the start factors of layer {part.layers[0]}")
        for name, pair in part.unpack(*(factors.read(key) for key in part.keys)).items():
            starts[name] = split.layers[name].starts(name, *pair, config, others.read).own
    return starts

"""load: a PissaModel over a folder whose weights are packed, or split, already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pissa.checkpoints.fill import fill_packed
from pissa.checkpoints.mapped_model import mapped_model
from pissa.checkpoints.residuals import Residuals
from pissa.config import IMPLICIT, PissaConfig
from pissa.distributed import failing_together
from pissa.files.checkpoint import Checkpoint
from pissa.files.hub import adapter_folder
from pissa.files.load import restore
from pissa.files.pissa_layout import ADAPTER_FILES, PISSA_RECORD
from pissa.files.source import Source
from pissa.model.decompose import decompose
from pissa.model.inject import check_adapter_name, materialise, own_config, warn_of_dropout
from pissa.model.pissa_model import PissaModel, model_class
from pissa.model.store import store


def load(
    folder: str | os.PathLike[str],
    config: PissaConfig | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    is_trainable: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    **config_fields: Any,
) -> PissaModel:
    """A PissaModel over the mapped files of a folder. Weights that are packed there are never dense in memory::

        model = pissa.load("out")  # what `pissa init` wrote
        model = pissa.load("out", adapter="run")  # with an adapter trained on it
        model = pissa.load("4bit", r=16, task_type="CAUSAL_LM")  # nf4, saved by transformers

    On a folder of `pissa init` nothing is decomposed: the model is the one that `pissa.wrap` makes of the dense
    checkpoint, bit for bit. Another folder is loaded and wrapped: a packed weight is decoded, decomposed and let go,
    one after another.

    The files must stay as they are while the model is used. Its pages of them are the system's cache: they take memory
    that other programs can have.

    Args:
        folder: of safetensors, with config.json.
        config: the configuration, copied; alternatively its fields as keywords. By default, of a folder of
            `pissa init` its own; another start or rank may be asked for there, not another form of the base.
        adapter: a folder that `save_pretrained` wrote of such a model, or a repository of the Hub. It has its own
            configuration.
        is_trainable: False freezes the adapter.
        device: where the model goes.
        dtype: of the tensors that are not packed; by default the folder's own.
        adapter_name: name of the adapter.
        progressbar: show a bar on stderr while weights are decomposed.
        config_fields: fields of `PissaConfig`, in the place of `config`.

    Raises:
        ValueError: a folder that is damaged, or does not fit the adapter or the configuration; the message names file,
            tensor or layer. And as `wrap`.
        TypeError: more than one of adapter, config and fields, or a layer that cannot be adapted.
        pissa.RankError: another process has failed.
    """
    with failing_together():
        source = Source.open(folder)
        residuals = Residuals.open(source.folder) if (source.folder / PISSA_RECORD).is_file() else None
        checkpoint = None if adapter is None else Checkpoint.read(adapter_folder(adapter, ADAPTER_FILES))
        config = _config(config, config_fields, residuals, checkpoint)
        config.inference_mode = not is_trainable
        warn_of_dropout(config)
        model, packed, quantization = mapped_model(source, dtype)
        check_adapter_name(adapter_name, model)
        if config.task_type is None and type(model).__name__.endswith("ForCausalLM"):
            config.task_type = "CAUSAL_LM"
        # The model card names what the plain LoRA is for: the dense model that was split.
        config.base_model_name_or_path = config.base_model_name_or_path or str(source.folder)
        model.config._name_or_path = model.name_or_path = config.base_model_name_or_path
        with _blamed(checkpoint):
            wrapped = model_class(config)(model, config, adapter_name)
        if residuals is None:
            fill_packed(model, packed, quantization)
        else:
            residuals.fill(model, packed, config)
        materialise(model, adapter_name)
        wrapped.to(device)
        left = {}
        if checkpoint is None:
            keep = residuals is not None
            left = decompose(model, adapter_name, config, first=True, progressbar=progressbar, keep_bases=keep)
        else:
            with _blamed(checkpoint):
                restore(checkpoint, wrapped, adapter_name)
    store(model, adapter_name, config, left)  # which tells the other processes of its errors itself
    return wrapped if is_trainable else wrapped.eval()


def _blamed(checkpoint: Checkpoint | None) -> AbstractContextManager[None]:
    return nullcontext() if checkpoint is None else checkpoint.blamed()


def _config(
    config: PissaConfig | None,
    fields: Mapping[str, Any],
    residuals: Residuals | None,
    checkpoint: Checkpoint | None,
) -> PissaConfig:
    """The configuration of the adapter."""
    given = {"config": config is not None, "its fields": bool(fields), "adapter": checkpoint is not None}
    if sum(given.values()) > 1:
        raise TypeError(f"give one of config, its fields and adapter, got {' and '.join(filter(given.get, given))}")
    if checkpoint is not None:
        return checkpoint.config
    if residuals is not None and config is None and not fields:
        return own_config(residuals.record.config)
    config = own_config(PissaConfig(**fields) if config is None else config)
    config.base_model_name_or_path = None
    if residuals is not None:
        own = residuals.record.config
        if config.form not in (IMPLICIT, own.form):
            raise ValueError(
                f"the residuals of {residuals.folder} are {own.form.describe()} and cannot become "
                f"{config.form.describe()}: leave quant, blocksize, double_quant and residual out"
            )
        config.base_model_name_or_path = own.base_model_name_or_path
    return config

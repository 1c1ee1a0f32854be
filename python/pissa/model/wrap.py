"""wrap: puts a PiSSA adapter on a model, given only a configuration. PEFT's functions do it too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from pissa.config import PissaConfig, PissaType
from pissa.containers.hub import absolute
from pissa.distributed import failing_together
from pissa.model.batches import Batch
from pissa.model.calibrate import moments_of, use_calibration
from pissa.model.calibration import Calibration
from pissa.model.decompose import decompose
from pissa.model.inject import check_plain, drop_gguf_mark, own_config, restored_on_error
from pissa.model.pissa_model import PissaModel, fuse_steps, model_class
from pissa.model.store import store
from pissa.model.tuner import BUILDING, PissaTuner
from pissa.peft_private import TunerToCome


def wrap(
    model: nn.Module,
    config: PissaConfig | None = None,
    *,
    calibration: Calibration | Iterable[Batch] | None = None,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    progressbar: bool = False,
    fuse: bool = True,
    precision: str = "float",
    **config_fields: Any,
) -> PissaModel:
    """Puts a PiSSA adapter on a model, in place, and returns the model that trains it::

        model = pissa.wrap(model, r=16, target_modules=["q_proj", "v_proj"])
        model = pissa.wrap(model, pissa.PissaConfig(r=16, quant="nf4"))

    Until the first training step, the wrapped model computes the same as the base, in evaluation mode bit for bit. With
    `quant`, the base is the quantised residual plus its principal part.

    With several processes (torch.distributed), all of them must call this function with the same model and
    configuration. They share the work, and an error in one is raised in all.

    The model may already be sharded: by fully_shard (FSDP2) over all processes, or by DeepSpeed ZeRO-3 when it was
    loaded, before deepspeed.initialize. All processes then gather each weight, and the one that decomposes it keeps it.
    In addition to its shards, a process holds one group of weights (a layer, or several layers with a few million
    elements together) and one weight in transit. With ZeRO-3, the adapter's parameters and a residual are partitioned
    like the rest. fully_shard manages only what it has sharded. Therefore the base stays as it is (no `quant`, no
    residual="explicit"), and the adapter's parameters are whole in every process. In each backward pass their gradients
    become the mean over all processes, so that they can be clipped and stepped as in a single process.

    Args:
        model: usually a transformers model. If anything is wrong with it or with the configuration, it is left as it
            was. With `quant` or residual="explicit", its dense weights are replaced and freed layer by layer once all
            start factors are computed, so that at most the dense model and one layer are in memory. If memory runs out
            then, the user interrupts, or another process fails, the model is left partly stored and must be loaded
            again; a note on the error says so.
        config: the configuration, which is copied. Alternatively, give its fields as keywords.
        calibration: with `quant`: batches of what the model will read, a thousand tokens or more, as `pissa.calibrate`
            takes them, or its result. The outputs of the base then lose less: the base is repaired, as with
            repair="activations", unless error_feedback=True or init="activations" determines how the calibration is
            used. If batches are given, a single process on a CPU keeps the second moments of one block in memory at a
            time. Several processes keep those of the whole model. So does one if layers outside of the blocks are
            adapted, such as lm_head, or if the model does more between its blocks than to pass on what they return.
        adapter_name: name of the adapter.
        autocast_adapter_dtype: keep the trained parameters in float32 on a 16-bit base.
        low_cpu_mem_usage: accepted for compatibility with PEFT; without effect: nothing is drawn or allocated twice.
        progressbar: show one bar on stderr. The environment variable TQDM_DISABLE hides it.
        fuse: on a CPU and in training mode (`model.train()`), compute attention, norms, gates, dense layers and the
            loss with pissa's kernels, as far as they compute what the model does; `model.fused` names these parts. They
            are the same within rounding. The loss needs no logits: a call with labels computes `logits` only if they
            are read, and returns no `past_key_values` unless `use_cache=True` is passed. In evaluation mode, under
            torch.compile and on other devices, the model computes its own. `unload` and `merge_and_unload` undo it.
        precision: "int8" computes products with a quantised base in integers while training on a CPU, see
            `PissaModel.precision`.
        config_fields: fields of `PissaConfig`, instead of `config`.

    Raises:
        TypeError: `model` is not a module, both config and fields are given, or a layer cannot be adapted.
        ValueError: no layer was found, the rank is too large for a layer (the message names it), a weight contains NaN
            or Inf, or the model is already wrapped.
        pissa.RankError: another process has failed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; pissa.load(folder) makes one [P010]"
        )
    with restored_on_error(model), failing_together():
        if config is not None and config_fields:
            raise TypeError(f"give config or its fields, got config and {', '.join(sorted(config_fields))} [P011]")
        config = own_config(PissaConfig(**config_fields) if config is None else config)
        use_calibration(config, calibration)
        check_plain(model, adapter_name)
        loaded_from = model.__dict__.get("name_or_path")
        config.base_model_name_or_path = absolute(loaded_from) if loaded_from else None
        wrapped = model_class(config)(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        with moments_of(wrapped, config, calibration, progressbar) as moments:
            replacements = decompose(model, adapter_name, config, progressbar=progressbar, calibration=moments)
    drop_gguf_mark(model)
    store(model, adapter_name, config, replacements)
    if fuse:
        fuse_steps(wrapped)
    wrapped.precision = precision
    return wrapped


# ---- A PissaConfig that is given to PEFT -----------------------------------------------------------------------------
#
# Given by `peft.get_peft_model(model, config)`, a trainer's `peft_config=`, or the class itself, `PeftModel(model,
# config)`. PEFT makes its PeftModel in several places, with or without its table of task types. Each call goes through
# the constructor of PeftModel, which looks up the tuner in a public table. In that table, our `peft_type` maps to
# `PissaTunerOrToCome`: the model that PEFT makes becomes the one that `wrap` returns. Nothing else in PEFT changes.


class PissaTunerOrToCome(PissaTuner):
    """The entry in PEFT's table of tuners: PissaTuner, except in the constructor of a PeftModel that is not ours."""

    def __new__(cls, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> Any:
        """Returns a PissaTuner, or, for a PeftModel that PEFT makes (which passes a dictionary), what makes it ours."""
        if BUILDING.get() or not isinstance(peft_config, Mapping):
            return PissaTuner(model, peft_config, adapter_name, **kwargs)
        config = peft_config[adapter_name]
        return TunerToCome(lambda name, cast: wrap(model, config, adapter_name=name, autocast_adapter_dtype=cast))


PEFT_TYPE_TO_TUNER_MAPPING[PissaType.PISSA] = PissaTunerOrToCome

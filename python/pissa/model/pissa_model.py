"""PissaModel: a peft.PeftModel whose adapters are changes of an unchanged base."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pissa.adapters.beside_lora import as_pissa, load_factors, read_plain_lora
from pissa.adapters.codes_file import CodesFile
from pissa.adapters.lora_folder import is_plain_lora
from pissa.adapters.peft_layout import PREFIX
from pissa.adapters.pissa_layout import ADAPTER_FILES, PissaFolder
from pissa.adapters.rest import Rest
from pissa.adapters.restore import restore
from pissa.adapters.save import save_adapter, warn_of_plain_lora
from pissa.base.classes import base_of, decoded_module, has_codes, has_our_codes
from pissa.base.forwards import replaced_parts, restore_forwards
from pissa.config import IMPLICIT, PissaConfig
from pissa.containers.hub import adapter_folder
from pissa.containers.messages import quote
from pissa.distributed import failing_together, is_of_an_engine, is_partitioned, is_sharded
from pissa.layers.experts import fuse_experts, unfused_experts
from pissa.layers.factory import computing_dtype
from pissa.layers.layer import PissaLayer, pissa_layers
from pissa.layers.tokens import TrainableTokensWrapper, check_tokens_can_be_merged
from pissa.model.decompose import decompose
from pissa.model.fused_head import fuse_head, over_trls_head
from pissa.model.fused_layers import fuse_layers
from pissa.model.inject import (
    check_adapter_name,
    check_plain,
    complete,
    drop_gguf_mark,
    drop_quantization,
    prepare,
    restored_on_error,
)
from pissa.model.store import store
from pissa.model.tuner import BUILDING, load_whole, refuse_codes, refuse_residuals, start_at_zero
from pissa.model.weighted import config_of_sum, set_to_sum
from pissa.notices import PrecisionWarning
from pissa.ops import build_info
from pissa.peft_private import MendedPeftModel


class PissaModel(MendedPeftModel):
    """A peft.PeftModel with PiSSA adapters. `pissa.wrap`, `peft.get_peft_model` with a PissaConfig, and
    `PissaModel.from_pretrained` create it."""

    def __init__(
        self, model: nn.Module, peft_config: PissaConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        """Injects the adapter's layers, which have no start factors yet. `wrap` and `from_pretrained` set the factors,
        and restore the model on failure."""
        prepare(model, peft_config)
        token = BUILDING.set(True)
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        finally:
            BUILDING.reset(token)
        complete(model, peft_config, adapter_name)
        model.register_state_dict_pre_hook(refuse_residuals)  # type: ignore[no-untyped-call]
        self.warned_of_plain_lora = False
        self.vocabulary_was_resized = False
        self.is_from_files = False
        self.rest, self.codes_file = Rest(), CodesFile()

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter that does not change the model's outputs yet. It shares the start factors of an adapter with
        the same rank, scaling and decomposition. A peft.LoraConfig is read as init="lora" with its own fields.

        The base function does not change: an adapter may ask for the form that a layer's base already has, or for none,
        which leaves a stored base as it is.

        Raises:
            TypeError, ValueError: as for `wrap`. The model is left as it was.
        """
        with restored_on_error(self), failing_together():
            config = as_pissa(peft_config)
            self._check_new_name(adapter_name)
            self._inject(adapter_name, config, autocast_adapter_dtype)
            base = self.base_model.model
            replacements = decompose(base, adapter_name, config, progressbar=False)
        store(base, adapter_name, config, replacements)

    def _check_new_name(self, adapter_name: str) -> None:
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists. [P027]")
        check_adapter_name(adapter_name, self.base_model.model)

    def _inject(self, adapter_name: str, config: PissaConfig, autocast_adapter_dtype: bool) -> None:
        """Adds the layers of another adapter, which have no start factors yet."""
        adapters = (parameter for name, parameter in self.named_parameters() if ".lora_" in name)
        if any(map(is_sharded, adapters)) or any(map(is_of_an_engine, self.modules())):
            raise ValueError(
                "the model's adapters are sharded, and FSDP or DeepSpeed would not see a new one: add it before "
                "fully_shard or deepspeed.initialize [P051]"
            )
        prepare(self.base_model.model, config)
        super().add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        complete(self.base_model.model, config, adapter_name)
        if self.fused:
            fuse_layers(self.base_model.model)
        self._multiply_in(self.precision)

    @property
    def fused(self) -> set[str]:
        """The parts of the model that pissa's kernels compute in training mode on a CPU, see `wrap`: of "attention",
        "norms", "gates", "dense layers" and "head". Whether the head is one of them is found at the first step."""
        base: Any = self.base_model.model
        parts = replaced_parts(base)
        attention = getattr(getattr(base, "config", None), "_attn_implementation", None)
        if "_fused_attention" in vars(base) and attention == "sdpa":
            parts.add("attention")
        return parts if getattr(base, "_fused_shape", True) else parts - {"head"}

    @property
    def precision(self) -> str:
        """How products with a base in codes are computed in training mode on a CPU, "float" or "int8".

        "float" computes in the activations' dtype; "int8" computes products of integers (`pissa.ops.linear`), about
        three times as fast as float32 with AVX-VNNI or AVX512_VNNI, 1.7 times with AVX2. The forward pass is then a
        slightly different function from that of evaluation mode, which computes in floating point always: a layer's
        output differs by about 1 % of its norm. Dense bases, and layers with dropout or DoRA of several adapters,
        compute in floating point.

        Raises:
            ValueError: "int8" is set for a model without codes, or the word is another.
        """
        return "int8" if any(layer.int8 for layer in self._layers()) else "float"

    @precision.setter
    def precision(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision: got {precision!r}; allowed: {', '.join(PRECISIONS)}")
        if precision == "int8":
            if not any(has_codes(layer.base.module) for layer in self._layers()):
                raise ValueError(
                    "precision: got 'int8', which multiplies with codes, and no adapted layer has any; quantise the "
                    "base (quant='nf4'), load one that is quantised, or leave precision out"
                )
            if (reason := _lacks_int8(self)) is not None:
                warnings.warn(f"precision='int8' has no effect: {reason}", PrecisionWarning, stacklevel=2)
        self._multiply_in(precision)

    def _layers(self) -> list[PissaLayer]:
        return list(pissa_layers(self.base_model.model).values())

    def _multiply_in(self, precision: str) -> None:
        for layer in self._layers():
            layer.int8 = precision == "int8"

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Adds an adapter whose change of each weight is the sum of `weight * s (B A - B0 A0)` over other adapters. It
        starts at zero, and is trained, saved and merged like any adapter.

        The rank of the new adapter in a layer is the sum of the ranks of the adapters' plain LoRAs, which are 2r, or r
        with an initialisation whose B0 is zero ("lora", "given"). It is at most the layer's smaller side.

        Args:
            adapters: names of adapters. They may have different layers, ranks and initialisations.
            weights: a finite number for each adapter.
            adapter_name: name of the new adapter.
            combination_type: "cat", the exact sum. PEFT's other types, and their options, are refused.

        Raises:
            ValueError: an argument is invalid, or an adapter is more than a low-rank change (DoRA, biases,
                `modules_to_save`, ...). The message names it. The model is left as it was.
        """
        if combination_type != "cat" or options:
            given = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise ValueError(
                f"add_weighted_adapter: got combination_type={combination_type!r}{given and f' and {given}'}; allowed: "
                "'cat' alone, the exact sum. For PEFT's other types, write each adapter as a plain LoRA (`pissa "
                "convert RUN LORA`), and load these with peft.PeftModel.from_pretrained"
            )
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"weights: got {len(weights)} for {len(adapters)} adapters; needed: one for each, at least one"
            )
        with restored_on_error(self), failing_together():
            self._check_new_name(adapter_name)
            base, terms = self.base_model.model, list(zip(adapters, weights, strict=True))
            self._inject(adapter_name, config_of_sum(base, self.peft_config, terms), autocast_adapter_dtype=True)
            start_at_zero(self, adapter_name)
            set_to_sum(base, adapter_name, terms)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges the adapters into dense weights that replace the base, as in PEFT. Trained tokens are merged into the
        weight itself.

        Raises:
            ValueError: one weight cannot hold the trained tokens. In this case nothing is merged.
        """
        check_tokens_can_be_merged(self.base_model.model, adapter_names)
        self.base_model.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Restores the base, bit for bit."""
        self.base_model.unmerge_adapter()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """As in torch. While adapters are merged, merged weights have their names without adapters, plus PEFT's
        "base_layer"."""
        named: Iterator[tuple[str, Any]] = super().named_parameters(prefix, recurse, remove_duplicate)
        base = self.base_model.model
        if recurse and not prefix and any(layer.merged for layer in pissa_layers(base).values()):
            return _with_unwrapped_names(base, named)
        return named

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but the state that `peft.set_peft_model_state_dict` loads is loaded entirely or not at all."""
        return load_whole(self, state_dict, partial(super().load_state_dict, strict=strict, assign=assign))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, if no adapter trains the embeddings or the output layer. `save_pretrained` then writes
        both with the adapter.

        Raises:
            ValueError: one of these layers is trained. The message names it. In this case nothing is changed.
        """
        base: Any = self.base_model.model
        embeddings: Any = base.get_input_embeddings()
        rows = base_of(embeddings).shown_weight(torch.float32).shape[0]
        size = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size == rows:
            return cast(nn.Module, embeddings)
        _check_can_be_resized(base)
        self.vocabulary_was_resized = True
        return cast(nn.Module, base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing))

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Returns the model with the adapters merged into dense weights, as in PEFT. Fused experts are fused again. If
        a merged weight was codes, all other codes are decoded, too, into weights of the model's dtype, so that the
        model can be saved.

        Raises:
            ValueError: as for `merge_adapter`.
        """
        base = self.base_model.model
        check_tokens_can_be_merged(base, adapter_names)
        changed = _changed_by_unloading(base, merges=True)
        model = self.base_model.merge_and_unload(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if changed or any(map(has_our_codes, model.modules())):
            _decode(model)
        return _as_given(model, changed or self.is_from_files)

    def unload(self) -> nn.Module:
        """Returns the base without adapters, as in PEFT. Fused experts are fused again. A base in codes of
        `pissa.load` keeps them, and cannot be saved."""
        changed = _changed_by_unloading(self.base_model.model, merges=False)
        return _as_given(self.base_model.unload(), changed or self.is_from_files)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the numbers of trainable parameters and of all parameters. A quantised element counts as one."""
        trainable, total = super().get_nb_trainable_parameters()
        for layer in pissa_layers(self.base_model.model).values():
            if not is_partitioned(layer.base.parameter):  # for a partitioned one, PEFT knows the size
                total += math.prod(layer.matrix_shape) - layer.base.parameter.numel()
        return trainable, total

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter to files of our own, from which `from_pretrained` continues training exactly from the
        current state of this model; and as a plain LoRA, which PEFT, vLLM and transformers load onto the unmodified
        base. Codes that error feedback has found have a file of their own, which the folders of this model share by
        hard links.

        The files of our own identify the base by fingerprints, which are computed once: of the adapted weights and, as
        far as they are not sharded or offloaded, of its other tensors. If you change a frozen weight after the first
        save, do it in place under `torch.no_grad()`, not through `weight.data`, which torch does not count as a change.

        An adapter that is not called "default" is saved in a sub-folder of its name. Every file but PEFT's model card
        is written under a temporary name, flushed and then renamed, so that a crash leaves the old adapter or the new
        one. The exception is a folder of another run that has a file with codes: if a crash replaces only that, loading
        says so.

        Args:
            save_directory: the folder; created if necessary.
            safe_serialization: must be True; this package never writes pickle.
            selected_adapters: names of the adapters to save (default: all).
            save_embedding_layers: whether the base's input embeddings and output layer are written too;
                `from_pretrained` then puts them into the base. "auto" writes them if the vocabulary was resized,
                because the new rows are random, or if the base's files are not available to show that. Of a base
                that was loaded from no files, it writes them if the adapter changes one of the two.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: accepted for compatibility with PEFT; without effect: files are
                converted.
            state_dict: the model's state dict, if the caller has gathered it.
            kwargs: ignored, as PEFT does.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickle; PiSSA adapters are safetensors only [P062]")
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file [P062]")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {unknown}. [P062]"
            )
        if is_main_process:
            warn_of_plain_lora(self)
            for name in names:
                save_adapter(self, name, save_directory, state_dict, save_embedding_layers)
            self.create_or_update_model_card(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PissaConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PissaModel:
        """Restores a saved adapter onto its base, bit for bit, without decomposing anything.

        Args:
            model: the unmodified base, its vocabulary resized as in training. On any failure it is left as it was.
            model_id: the folder that `save_pretrained` wrote, or the id of a repository on the Hugging Face Hub with
                these files. A folder of that name takes precedence.
            adapter_name: name of the adapter.
            is_trainable: False freezes the adapter and puts the model into evaluation mode.
            autocast_adapter_dtype: keep the adapter's parameters in float32 on a 16-bit base.
            config: used instead of the saved configuration, without a copy. It may differ from that one in fields that
                do not change the function, such as `lora_dropout`; see `PissaConfig.from_pretrained`.
            ephemeral_gpu_offload, low_cpu_mem_usage: accepted for compatibility with PEFT; without effect.
            key_mapping: must be empty, because the layers have the names under which they were saved.
            kwargs: `fuse`, see `pissa.wrap`; `subfolder`; for the Hub `revision`, `token`, `cache_dir`,
                `local_files_only` and similar options. Unknown options are ignored, as in PEFT. `torch_device` is
                ignored because the adapter is put on the device of its layer. `device_map`, `max_memory` and similar
                options are ignored because a dispatched base stays as it is.

        Raises:
            ValueError: the folder contains no PiSSA adapter, or another program has replaced the plain LoRA in it; a
                file is damaged, an option cannot be honoured, or the base differs from the one that the adapter was
                trained on. The first differing layer, or tensor of the rest of the base, is named.
            TypeError: `config` is not a PissaConfig.
        """
        check_plain(model, adapter_name)
        _check_options(key_mapping=key_mapping, **kwargs)
        saved = PissaFolder.open(adapter_folder(model_id, ADAPTER_FILES, **kwargs), config)
        saved.config.inference_mode = not is_trainable
        with saved.blame(), restored_on_error(model):
            wrapped = model_class(saved.config)(
                model, saved.config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
            )
            restore(saved, wrapped, adapter_name)
        drop_gguf_mark(model)
        if kwargs.get("fuse", True):
            fuse_steps(wrapped)
        return wrapped if is_trainable else wrapped.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        config: PissaConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Adds a saved adapter, or restores the saved state of an adapter that the model already has. It can also add a
        plain PEFT LoRA, as an adapter whose start is zero (`init` "given").

        Args:
            model_id: as for `from_pretrained`, or a folder with a plain LoRA.
            adapter_name: name of the adapter.
            is_trainable: whether a new adapter is trained; False puts the model into evaluation mode.
            torch_device: accepted for compatibility with PEFT; without effect: the adapter goes to its layer's device.
            autocast_adapter_dtype: keep the adapter's parameters in float32 on a 16-bit base.
            ephemeral_gpu_offload, low_cpu_mem_usage: accepted for compatibility with PEFT; without effect.
            key_mapping: see `from_pretrained`.
            config: see `from_pretrained`. For an adapter that the model has, it is only compared with the saved one.
            kwargs: see `from_pretrained`.

        Returns:
            PEFT's load result, torch's named tuple of missing_keys and unexpected_keys. Both are empty, because an
            adapter with a missing or an extra tensor is refused.

        Raises:
            ValueError, TypeError: as for `from_pretrained`. The model is left as it was.
        """
        known = adapter_name in self.peft_config
        if not known:
            check_adapter_name(adapter_name, self.base_model.model)
        _check_options(key_mapping=key_mapping, **kwargs)
        folder = adapter_folder(model_id, ADAPTER_FILES, **kwargs)
        if known:
            restore(PissaFolder.open(folder, config), self, adapter_name)
        elif config is None and is_plain_lora(folder):
            lora_config, lora = read_plain_lora(folder)
            lora_config.inference_mode = not is_trainable
            with restored_on_error(self):
                self._inject(adapter_name, lora_config, autocast_adapter_dtype)
                load_factors(self, adapter_name, lora)
        else:
            saved = PissaFolder.open(folder, config)
            saved.config.inference_mode = not is_trainable
            with saved.blame(), restored_on_error(self):
                self._inject(adapter_name, saved.config, autocast_adapter_dtype)
                restore(saved, self, adapter_name)
        if is_trainable and not known:
            self.set_requires_grad(adapter_name)
        if not is_trainable:
            self.eval()
        return nn.Module().load_state_dict({})  # torch has no public name for the type


# A PissaModel for each of PEFT's task classes: PissaModelForCausalLM and so on, named in this module for pickle.
_CLASSES: dict[str | None, type[PissaModel]] = {}
for _task, _peft_class in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items():
    _name = f"Pissa{_peft_class.__name__.removeprefix('Peft')}"
    _namespace = {"__module__": __name__, "__doc__": f"PissaModel for task type {_task}."}
    _CLASSES[_task] = globals()[_name] = cast("type[PissaModel]", type(_name, (PissaModel, _peft_class), _namespace))


def model_class(config: PissaConfig) -> type[PissaModel]:
    """The model class for the configuration's task type."""
    return _CLASSES.get(config.task_type, PissaModel)


PRECISIONS = ("float", "int8")


def _lacks_int8(model: PissaModel) -> str | None:
    """Why no product of the model is of integers, if that is so."""
    if all(layer.base.device.type != "cpu" for layer in model._layers()):
        return "the model is not on a CPU"
    info = build_info()
    if info["int8"]:
        return None
    return f"this processor's instruction set, {info['isa']}, multiplies bytes no faster than floating-point numbers"


def fuse_steps(model: PissaModel) -> None:
    """Makes a model compute training steps with our kernels, as far as they compute what it does."""
    fuse_layers(model.base_model.model)
    fuse_head(model.base_model.model)
    model.register_forward_pre_hook(over_trls_head)


def _check_options(**options: Any) -> None:
    """Raises ValueError for an option of PEFT's that would change which tensors are restored."""
    for name in ("key_mapping", "ignore_mismatched_sizes"):
        if value := options.get(name):
            raise ValueError(
                f"{name}={quote(value)} is not supported: an adapter is restored as a whole, into layers of the names "
                "that it was saved with. Load the base that it was trained on, or use peft.PeftModel.from_pretrained, "
                "for which the folder is a plain LoRA [P061]"
            )


def _changed_by_unloading(base: nn.Module, *, merges: bool) -> bool:
    """Whether some layer of an (unwrapped) model, which may have been codes, becomes dense when it is unloaded; or has
    become so before."""
    bases = [layer.base for layer in pissa_layers(base).values()]
    is_dense_then = any(own.form != IMPLICIT or (merges and own.is_quantised) for own in bases)
    return is_dense_then or refuse_codes in base._state_dict_pre_hooks.values()


def _decode(model: nn.Module) -> None:
    """Replaces all modules of an unloaded model whose weights are codes by dense ones. Tied weights stay tied."""
    dtype, weights = computing_dtype(model), dict[int, nn.Parameter]()
    modules = dict[nn.Module, nn.Module | None]()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in modules:
            dense: Any = decoded_module(module, dtype)
            if dense is not None:
                dense.weight = weights.setdefault(id(module.weight), dense.weight)
            modules[module] = dense
        if (replacement := modules[module]) is not None:
            model.set_submodule(name, replacement)


def _as_given(model: nn.Module, changed: bool) -> nn.Module:
    """Returns an unloaded model, restored to its state before it was wrapped. `changed` says that a quantisation in the
    model's configuration does not describe it any more."""
    fuse_experts(model)
    restore_forwards(model)
    hooks = model._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook in (refuse_residuals, refuse_codes)]:
        del hooks[key]
    if not any(map(has_codes, model.modules())):
        drop_quantization(model)
    elif changed:
        model.register_state_dict_pre_hook(refuse_codes)  # type: ignore[no-untyped-call]
    return model


def _check_can_be_resized(base: Any) -> None:
    """Raises ValueError if an adapter trains the embeddings or the output layer of an (unwrapped) transformers model.
    transformers would replace these layers without knowing about the adapter."""
    names = {module: name for name, module in base.named_modules()}
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if module is not None and base_of(module).is_quantised:
            raise ValueError(f"the vocabulary cannot be resized: the weight of {names[module]} is in codes [P025]")
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            field = "target_modules" if isinstance(module, PissaLayer) else "modules_to_save"
            field = "trainable_token_indices" if isinstance(module, TrainableTokensWrapper) else field
            raise ValueError(
                f"the vocabulary cannot be resized: {names[module]} is trained ({field}). Resize it before pissa.wrap; "
                "or, for what has been trained: model = model.merge_and_unload(), resize that, and wrap it anew [P025]"
            )


def _with_unwrapped_names(base: nn.Module, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of a merged PissaModel over the (unwrapped) model `base`, under the names that the model
    has without adapters. TRL, for example, sends them to the engine that generates: it merges, removes "base_layer"
    from the names, and leaves out LoRA's parameters. Experts that were turned into linear layers are one parameter
    again, which is a copy. Trained tokens are only in the weight of their embedding."""
    experts = {f"{PREFIX}{path}.": module for path, module in unfused_experts(base).items()}
    for name, parameter in named:
        if path := next((path for path in experts if name.startswith(path)), None):
            module, rest = experts[path], name.removeprefix(path)
            index, _, inner = rest.partition(".")
            if index == "fused":
                yield path + inner, parameter
            elif "lora_" in inner:
                yield name, parameter
            elif index == "0":
                weight = inner.partition(".")[0]
                yield path + weight, module.fused_weight(weight)
        elif ".trainable_tokens_" not in name:
            yield name.replace(".token_adapter.base_layer.", ".base_layer."), parameter

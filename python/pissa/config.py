"""What the user asks for: PissaConfig, a LoraConfig with the fields of the decomposition.

The only file that uses private names of PEFT: `LoraConfig._register_custom_module` (experimental, says its
documentation), through which a LoRA layer class of one's own is made known, a conversion of targets that has to be kept
from ours, what "all-linear" means and which layers PEFT refuses, the hooks of `adapter_names`, and the fetching of
offloaded weights. All are there from peft 0.21 on.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import tuners_utils
from peft.utils import PeftType, transformers_weight_conversion
from torch import nn

from pissa.ops.formats import FORMATS

Svd = Literal["krylov", "subspace", "exact"]
Passes = Literal["auto"] | int
Residual = Literal["implicit", "explicit"]
Storage = Literal["uint8", "bfloat16", "float16", "float32"]
Init = Literal["pissa", "pissa_medium", "pissa_minor", "lora", "olora", "loftq", "given"]

# The fields of LoraConfig that mean the same here. Every other one must keep its default, so that whatever a
# later PEFT adds is refused by name until somebody has thought about it.
_SUPPORTED = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "bias",
        "fan_in_fan_out",  # of Conv1D; which layers that is needs no telling
        "target_parameters",  # of fused experts
        "use_dora",
    }
)


class PissaType(str, enum.Enum):
    """`peft_type` of a PissaConfig. Under LORA's, PEFT would hand out dA and dB as A and B, and take A and B for them:
    see `tuner`."""

    PISSA = "PISSA"


class Form(NamedTuple):
    """How a layer keeps its base: `residual` is "implicit" (dense weight untouched), "explicit" or "nf4"."""

    residual: str
    blocksize: int | None = None
    double_quant: bool | None = None

    def describe(self) -> str:
        """The form in words, for messages."""
        details = "" if self.blocksize is None else f" (blocksize {self.blocksize}, double_quant {self.double_quant})"
        return self.residual + details

    def options(self) -> dict[str, Any]:
        """The form as keyword arguments of `ops.residual`."""
        return {"form": self.residual, "blocksize": self.blocksize, "double_quant": self.double_quant}


IMPLICIT = Form("implicit")


@dataclass
class PissaConfig(LoraConfig):  # type: ignore[misc]
    """Configuration of a PiSSA adapter: `peft.LoraConfig` with the paper's defaults and the fields below.

    Defaults that differ from LoraConfig: `lora_alpha` is the rank, of each layer in `rank_pattern` as well,
    so that the scaling is 1; `target_modules` is "all-linear", which leaves out the output layer as PEFT
    does.

    "all-linear", given or by default, leaves the choice of layers to us. So a layer whose smaller side is less than `r`
    gets the smaller side as its rank, with the scaling that `r` would give it, and layers that PEFT refuses in a family
    (Mamba's out_proj) are left out. One warning says so. Names and patterns in `target_modules`, and ranks in
    `rank_pattern`, are taken as they are given: there such a layer is an error.

    Args:
        init: "pissa" starts from the principal singular components. To compare with it: "pissa_medium" and
            "pissa_minor" from those in the middle and at the end of the spectrum (the paper's figure 8), "lora" from
            B = 0, "olora" from a QR factorisation, "loftq" (with `quant`) from the error of 4 bits. "given" is what an
            adapter says whose factors come from elsewhere, from other adapters (`add_weighted_adapter`) or a plain LoRA
            (`peft.set_peft_model_state_dict`); it cannot be asked for.
        svd: "krylov" (block Krylov, default) or "subspace" iteration, or "exact" for a full decomposition.
        svd_passes: passes over each weight: an even number, at least 2, or "auto", as many as its rank needs; see
            `pissa.ops.svd_lowrank`. Not used by "exact".
        seed: seed of the random sketch. The result does not depend on torch's generator.
        quant: "nf4" keeps the residual in 4 bits (QPiSSA); None keeps it as `residual` says.
        quant_iters: alternations of decomposition and quantisation. Only 1 for now.
        blocksize: weights that share one NF4 scale; a power of two from 32 to 4096.
        double_quant: quantise the NF4 scales as well.
        quant_storage: dtype of the parameters that hold the 4-bit codes, as in bitsandbytes: "uint8", or "bfloat16",
            "float16" or "float32" for FSDP where it wants one dtype, or casts parameters to one (give that one). Layers
            that bitsandbytes has quantised keep theirs.
        residual: "implicit" leaves the dense weight untouched; "explicit" replaces it by W - s B0 A0, as the
            paper does. A residual in 4 bits is always stored: with `quant` this field has no effect.
        use_adalora: train the singular values as a vector of their own, with the singular vectors (AdaLoRA, without
            its pruning of ranks; the paper's appendix A).
        orth_reg_weight: with `use_adalora`, weight of what keeps the vectors orthogonal, which the model adds to
            its loss while it is in training mode.

    `use_dora` is LoraConfig's: magnitudes are trained beside the directions (arXiv 2402.09353); linear layers only.
    `trainable_token_indices` too: rows of embeddings, which no adapter changes, are trained as they are.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed. Options of LoRA that do
            not work with PiSSA (`loftq_config`, EVA, `lora_bias`, ...) are refused.
    """

    # LoraConfig's default is 8 whatever the rank is.
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA alpha; the rank unless given"})
    init: Init = field(default="pissa", metadata={"help": "Where the adapter starts"})
    svd: Svd = field(default="krylov", metadata={"help": "Decomposition: krylov, subspace or exact"})
    svd_passes: Passes = field(default="auto", metadata={"help": "Passes over each weight, even, or auto"})
    seed: int = field(default=0, metadata={"help": "Seed of the random sketch"})
    quant: Literal["nf4"] | None = field(default=None, metadata={"help": "Store the residual in 4 bits"})
    quant_iters: int = field(default=1, metadata={"help": "Alternations of SVD and quantisation"})
    blocksize: int = field(default=64, metadata={"help": "Weights that share one NF4 scale"})
    double_quant: bool = field(default=True, metadata={"help": "Quantise the NF4 scales as well"})
    quant_storage: Storage = field(default="uint8", metadata={"help": "dtype of the parameters that hold 4-bit codes"})
    residual: Residual = field(default="implicit", metadata={"help": "implicit or explicit"})
    use_adalora: bool = field(default=False, metadata={"help": "Train the singular values as a vector of their own"})
    orth_reg_weight: float = field(default=0.5, metadata={"help": "Weight of orthogonality, with use_adalora"})

    def __post_init__(self) -> None:
        self._check_lora_fields()
        if self.target_modules is None:  # type: ignore[has-type]
            self.target_modules = "all-linear"
        if self.lora_alpha is None:
            self.lora_alpha = self.r
            given = self.alpha_pattern or {}  # type: ignore[has-type]
            self.alpha_pattern = {**(self.rank_pattern or {}), **given}
        self._check_scaling()
        self._check_own_fields()
        super().__post_init__()
        self.peft_type = PissaType.PISSA
        self.build_layers_with(_refuse)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PissaConfig:
        """The configuration that an adapter was saved with, or that `PissaConfig.save_pretrained` wrote, for `wrap`.

        What `peft.LoraConfig.from_pretrained` reads of an adapter is the plain LoRA beside it, of twice the rank.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository of the Hugging Face Hub; a folder wins.
            subfolder: of either.
            kwargs: for the Hub `revision`, `token`, `cache_dir` and the like; others are ignored, as PEFT does.

        Raises:
            ValueError: no such configuration there, or a damaged file, naming file and field.
        """
        # Reading stands on the configuration.
        from pissa.files.hub import adapter_folder
        from pissa.files.load import read_config
        from pissa.files.save import CONFIG_FILES

        return read_config(adapter_folder(pretrained_model_name_or_path, CONFIG_FILES, subfolder=subfolder, **kwargs))

    @property
    def form(self) -> Form:
        """How the adapted layers keep their base."""
        if self.quant == "nf4":
            return Form("nf4", self.blocksize, self.double_quant)
        return Form(self.residual)

    def build_layers_with(self, factory: Callable[..., nn.Module]) -> None:
        """Makes PEFT build every layer by `factory(target, adapter_name, config=self, **kwargs)`."""
        self._register_custom_module({nn.Module: factory})

    def as_lora(self) -> LoraConfig:
        """The plain LoRA of twice the rank that has the same scaling in every layer."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig)}
        # s = alpha / r, or alpha / sqrt(r) with rsLoRA, stays what it is when r doubles.
        grow = math.sqrt(2) if self.use_rslora else 2
        fields["r"] = 2 * self.r
        fields["lora_alpha"] = grow * fields["lora_alpha"]
        fields["rank_pattern"] = {key: 2 * rank for key, rank in (self.rank_pattern or {}).items()}
        fields["alpha_pattern"] = {key: grow * alpha for key, alpha in (self.alpha_pattern or {}).items()}
        fields["inference_mode"] = True
        lora = LoraConfig(**fields)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(lora, name), set):
                setattr(lora, name, sorted(getattr(lora, name)))  # the same file every time
        return lora

    def _check_lora_fields(self) -> None:
        if self.init_lora_weights is not True:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported: PiSSA starts from the "
                "principal singular vectors; leave it out, and choose the decomposition with svd, svd_passes"
            )
        for f in dataclasses.fields(LoraConfig):
            if f.name in _SUPPORTED or f.name == "init_lora_weights":
                continue
            default, value = default_of(f), getattr(self, f.name)
            if value != default:
                raise ValueError(
                    f"{f.name}={value!r} is not supported with PiSSA; leave it out (default {default!r}), or "
                    "use peft.LoraConfig for a plain LoRA adapter"
                )

    def _check_scaling(self) -> None:
        ranks = {
            "r": self.r,
            **{f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()},
        }
        for name, rank in ranks.items():
            if not _is_int(rank) or rank < 1:
                raise ValueError(f"`{name}` should be a positive integer value but the value passed is {rank!r}")
        alphas = {
            "lora_alpha": self.lora_alpha,
            **{f"alpha_pattern[{key!r}]": alpha for key, alpha in (self.alpha_pattern or {}).items()},
        }
        for name, alpha in alphas.items():
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
                raise ValueError(f"{name} must be a positive number (its factors are scaled by 1/alpha), got {alpha!r}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")

    def _check_own_fields(self) -> None:
        _check_choice("init", self.init, get_args(Init))
        _check_choice("svd", self.svd, get_args(Svd))
        _check_choice("quant", self.quant, (None, "nf4"))
        _check_choice("quant_storage", self.quant_storage, get_args(Storage))
        _check_choice("residual", self.residual, get_args(Residual))
        passes = self.svd_passes
        if passes != "auto" and (not _is_int(passes) or passes < 2 or passes % 2):
            raise ValueError(f'svd_passes must be "auto" or an even integer, at least 2, got {passes!r}')
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {self.seed!r}")
        if not _is_int(self.quant_iters) or self.quant_iters < 1:
            raise ValueError(f"quant_iters must be a positive integer, got {self.quant_iters!r}")
        if self.quant_iters > 1:
            raise ValueError(f"quant_iters={self.quant_iters} is planned but not available yet; use quant_iters=1")
        blocksizes = list(FORMATS["nf4"].blocksizes)
        if self.blocksize not in blocksizes:
            raise ValueError(f"blocksize must be one of {blocksizes}, got {self.blocksize!r}")
        for name in ("double_quant", "use_adalora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.orth_reg_weight, (int, float)) or not 0 <= self.orth_reg_weight < math.inf:
            raise ValueError(f"orth_reg_weight must be a number from 0 on, got {self.orth_reg_weight!r}")
        tokens = self.trainable_token_indices or []
        for index in itertools.chain(*tokens.values()) if isinstance(tokens, dict) else tokens:
            if not _is_int(index) or index < 0:
                raise ValueError(f"trainable_token_indices must be integers from 0 on, got {index!r}")
        if self.init == "loftq" and self.quant is None:
            raise ValueError('init="loftq" starts from the error of 4 bits: give quant="nf4" with it')
        if self.use_adalora and (self.use_dora or not self.init.startswith("pissa")):
            raise ValueError(
                f"use_adalora trains singular values: got init={self.init!r}, use_dora={self.use_dora}; allowed with "
                "it are pissa, pissa_medium and pissa_minor, without use_dora"
            )


PEFT_TYPE_TO_CONFIG_MAPPING[PissaType.PISSA] = PissaConfig  # for PeftConfig.from_pretrained of what we have written


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a configuration's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@contextmanager
def targets_as_given() -> Iterator[None]:
    """Keeps PEFT, for the block, from rewriting the targets of models with fused experts.

    It would make parameters of the experts of every layer called gate_proj, up_proj, down_proj, w1, w2, w3 or gate, of
    shared experts and dense layers as well, which would then have no adapter. We have unfused the experts.
    """
    name = "convert_peft_config_for_transformers"
    convert = getattr(transformers_weight_conversion, name)
    setattr(transformers_weight_conversion, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(transformers_weight_conversion, name, convert)


def rewritten_by_peft(config: LoraConfig, model: nn.Module) -> bool:
    """Whether PEFT, loading the configuration onto `model`, would take some of its targets for fused experts."""
    probe = copy.deepcopy(config)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:  # only some of the targets that are fused into one parameter
        return True
    return bool(probe.target_parameters)


@contextmanager
def fetched_by_layers() -> Iterator[None]:
    """Keeps PEFT, for the block, from fetching the weights of offloaded modules: it fetches the whole model at once,
    and offloads again what is in the base's place afterwards. Our layers fetch what they need."""
    fetch = tuners_utils.onload_layer
    tuners_utils.onload_layer = nullcontext
    try:
        yield
    finally:
        tuners_utils.onload_layer = fetch


class TakesHooksOff(PeftModel):  # type: ignore[misc]
    """A PeftModel that takes the hooks of `adapter_names` off its layers after a forward pass that fails, too. PEFT
    leaves them on, and every later pass has the names of the failed one."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        hooks.__enter__()
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)


def is_all_linear(config: LoraConfig) -> bool:
    """Whether the choice of layers is left to us."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def all_linear(config: LoraConfig, model: nn.Module) -> set[str]:
    """The names of the layers that "all-linear" means in `model`."""
    names: set[str] = tuners_utils._maybe_include_all_linear_layers(copy.copy(config), model).target_modules
    return names


def is_refused_by_peft(config: LoraConfig, model: nn.Module, name: str) -> bool:
    """Whether PEFT refuses to adapt the layer, whose weight the kernels of such models read without calling it."""
    try:
        check_mamba(config, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def check_mamba(config: LoraConfig, model: nn.Module, target_name: str) -> None:
    """Raises ValueError for a layer, given by the last part of its name, that PEFT refuses to adapt by LoRA."""
    lora = copy.copy(config)
    lora.peft_type = PeftType.LORA
    tuners_utils._check_lora_target_modules_mamba(lora, model, target_name)


def exactly(name: str) -> str:
    """A key of `rank_pattern` and `alpha_pattern` for the layer of that name alone. PEFT searches from the end of a
    name; the anchor keeps the pattern from every other name."""
    return f"^{re.escape(name)}"


def _refuse(target: nn.Module, adapter_name: str, **kwargs: Any) -> NoReturn:
    raise TypeError(
        "a PissaConfig needs pissa.wrap(model, config), got peft.get_peft_model, which cannot start the adapter; where "
        "a trainer calls that for peft_config=, give the trainer pissa.wrap(model, config) as its model"
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

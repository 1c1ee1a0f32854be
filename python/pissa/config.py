"""The user's settings: PissaConfig, a LoraConfig with additional fields for the decomposition."""

from __future__ import annotations

import copy
import dataclasses
import enum
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, get_args

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from pissa.ops.checks import check_choice, check_seed
from pissa.ops.formats import FORMATS
from pissa.peft_private import build_layers_with

Residual = Literal["explicit"]
Storage = Literal["uint8", "bfloat16", "float16", "float32"]

ALTERNATING: tuple[str, ...] = ("pissa", "activations")
"""The init methods that can alternate decomposition and quantisation."""

# The fields of LoraConfig that mean the same here. Every other field must keep its default. A field that a later PEFT
# adds is refused by name until it has been examined.
SUPPORTED = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "rank_pattern",
        "lora_alpha",
        "alpha_pattern",
        "use_rslora",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "trainable_token_indices",
        "bias",
        "use_dora",
        "target_parameters",  # of fused experts only
        "fan_in_fan_out",  # Conv1D only; detected automatically, so the value is ignored
    }
)


class PissaType(str, enum.Enum):
    """The `peft_type` of a PissaConfig. With LORA's, `get_peft_model_state_dict` would return dA and dB as A and B, and
    `set_peft_model_state_dict` would read A and B as dA and dB; see `model.tuner`."""

    PISSA = "PISSA"


class Form(NamedTuple):
    """The form in which a layer keeps its base."""

    name: str
    """Either "implicit", for the weight as it was given, or "explicit", for the dense residual W - s B0 A0, or the
    format of the quantised residual, one of `ops.formats.FORMATS`."""
    double_quant: bool | None = None
    """None where there is no choice."""

    @staticmethod
    def quantised(format: str, double_quant: bool) -> Form:
        """A quantised form with the options that its format has."""
        return Form(format, double_quant if FORMATS[format].has_double_quant else None)

    def describe(self) -> str:
        """The form in words, for messages."""
        return self.name if self.double_quant is None else f"{self.name} (double_quant {self.double_quant})"

    def options(self) -> dict[str, Any]:
        """The form as keyword arguments of `ops.residual_many`."""
        return {"form": self.name, "double_quant": self.double_quant}


IMPLICIT = Form("implicit")


_INIT_HELP = (
    "Initialisation: pissa, lora or activations. On a 16-bit base at the default rates, pissa and lora are "
    "level; lora suits bases in codes (quant, released models, GGUF), rewards, and a search for the best rate"
)


@dataclass
class PissaConfig(LoraConfig):  # type: ignore[misc]
    """Configuration of a PiSSA adapter: `peft.LoraConfig` with the paper's defaults and the fields below.

    Defaults that differ from LoraConfig: `lora_alpha` is the rank, also for each layer in `rank_pattern`, so that the
    scaling is 1; `target_modules` is "all-linear", which leaves out the output layer as in PEFT.

    With "all-linear", given or by default, pissa chooses the layers. A layer whose smaller side is less than `r` then
    gets that side as its rank, with the scaling that `r` would give it. Two kinds of layers are left out: those whose
    weights the model's code may read while bypassing an adapter (Mamba's out_proj, x_proj and dt_proj), and those that
    are linear layers only by their class (Llama 4's router). One warning reports this. Names and patterns in
    `target_modules`, and ranks in `rank_pattern`, are taken as given: such a layer is then an error.

    In a multimodal model of transformers that generates text (its configuration has a text_config), "all-linear" means
    the language part, `get_decoder()`, which the logger "pissa" reports as INFO. PEFT also includes vision tower, audio
    tower and projector. Names and patterns apply to every part, as in PEFT: `target_modules=["q_proj", "v_proj"]` means
    all layers with these names, and with `exclude_modules=r".*vision_tower.*"` only those outside the tower. To target
    every linear layer, give `[name for name, module in model.named_modules() if type(module) is nn.Linear and name !=
    "lm_head"]`.

    Args:
        init: "pissa", the default, starts from the principal singular components; one whose singular value is 0 starts
            as with "lora", which starts from B = 0. On a 16-bit base at their default rates, both are level; on a base
            in codes, for rewards, and at its own best rate, "lora" is the better choice (docs/choices.md).
            "activations" (with `quant`) starts from the part of the format's error which matters most to the outputs,
            given the layer's inputs (QERA, arXiv 2410.06040), which needs a calibration; see `pissa.wrap`. "given"
            marks an adapter whose factors come from a plain LoRA (`peft.set_peft_model_state_dict`) or from other
            adapters (`add_weighted_adapter`). It cannot be requested. A method of your own is one that you have added
            to `pissa.INIT_METHODS`.
        repair: the start that a stored base lacks and adds again exactly: that of `init` (None), or that of any other
            method. With `init="lora", repair="pissa", quant="nf4"`, LoRA trains on QPiSSA's base. With `init="pissa",
            repair="lora"`, PiSSA trains on the plainly quantised weight, from which LoRA's start takes nothing out.
            With `repair="activations"` and a calibration, the outputs of the base are repaired, not its weights. Only
            with `quant` or residual="explicit".
        seed: seed of the random sketch. The result does not depend on torch's generator.
        quant: "nf4" keeps the residual in 4 bits (QPiSSA), and "int8" in 8, with a scale for each row. "mxfp4",
            "nvfp4", "int4" and "fp8" are the formats of released models. None keeps the base as `residual` says.
        error_feedback: find the codes of the residual by error feedback (GPTQ, arXiv 2210.17323), which loses less of
            the outputs in the same number of bytes. With `quant` and a calibration; see `pissa.wrap`.
        quant_iters: T, the number of alternations of decomposition and quantisation, with `quant`, if the residual
            lacks the start of "pissa" or "activations". With more than 1, the start factors are those of the
            residual's error W - Q, and Q lacks those of the previous alternation; the best alternation is kept. It
            costs T + 1 decompositions.
        double_quant: quantise the NF4 scales as well. Those of INT8 stay float32.
        quant_storage: dtype of the parameters that hold the quantised codes, as in bitsandbytes: "uint8", "bfloat16",
            "float16" or "float32". FSDP may require all parameters in one dtype, or cast them to one; then give that
            one. Layers that bitsandbytes has quantised keep theirs.
        residual: None leaves the dense weight unchanged. "explicit" replaces it by W - s B0 A0, as in the paper. Not
            together with `quant`, which determines how the residual is kept.
        merge_aware: train what a merge into the codes of the base will be: layers whose base is codes compute with the
            codes of `pissa.ops.merge_codes`, and gradients pass as if nothing were rounded. `pissa merge --quant same`
            and `pissa export --to gguf-model` then write, bit for bit, the model that was trained. The adapter beside
            the base stays usable. Computed on a CPU; it takes a second copy of the codes.

    `use_dora` is LoraConfig's: magnitudes are trained in addition to the directions (arXiv 2402.09353), for linear
    layers only. `trainable_token_indices` is LoraConfig's, too: rows of embeddings that no adapter changes are trained
    directly.

    Raises:
        TypeError, ValueError: a field is invalid; the message names it, what was given and what is allowed. Options of
            LoRA that do not work with PiSSA (`loftq_config`, EVA, `lora_bias`, ...) are refused.
    """

    # LoraConfig's default is 8, whatever the rank is.
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA alpha (default: the rank)"})
    init: str = field(default="pissa", metadata={"help": _INIT_HELP})
    repair: str | None = field(default=None, metadata={"help": "Initialisation that a base lacks (None: init's)"})
    seed: int = field(default=0, metadata={"help": "Seed of the random sketch"})
    quant: str | None = field(default=None, metadata={"help": "Format of the quantised residual"})
    error_feedback: bool = field(default=False, metadata={"help": "Find codes by error feedback; needs a calibration"})
    quant_iters: int = field(default=1, metadata={"help": "Alternations of SVD and quantisation"})
    double_quant: bool = field(default=True, metadata={"help": "Quantise the NF4 scales as well"})
    quant_storage: Storage = field(default="uint8", metadata={"help": "dtype of the parameters that hold codes"})
    residual: Residual | None = field(default=None, metadata={"help": "explicit: keep W - s B0 A0, not the weight"})
    merge_aware: bool = field(default=False, metadata={"help": "Train through the rounding of a merge into codes"})

    init_methods: ClassVar[Mapping[str, object]]
    """The methods that `init` and `repair` may name. `base.init_methods` sets it."""

    reader: ClassVar[Callable[..., PissaConfig]]
    """Called by `from_pretrained`. `adapters.pissa_layout` sets it, because files depend on the configuration, which
    cannot import them."""

    def __post_init__(self) -> None:
        self._check_lora_fields()
        if self.target_modules is None:  # type: ignore[has-type]
            self.target_modules = "all-linear"
        if self.lora_alpha is None:
            self.lora_alpha = self.r
            self.alpha_pattern = {**(self.rank_pattern or {}), **(self.alpha_pattern or {})}  # type: ignore[has-type]
        self._check_scaling()
        self._check_own_fields()
        super().__post_init__()
        self.peft_type = PissaType.PISSA
        build_layers_with(self, _refuse)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PissaConfig:
        """Reads the configuration that an adapter was saved with, or that `PissaConfig.save_pretrained` wrote, for
        `wrap`.

        `peft.LoraConfig.from_pretrained` reads the plain LoRA from the same folder.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository on the Hugging Face Hub. A folder takes
                precedence.
            subfolder: a sub-folder of either.
            kwargs: options of the Hub: `revision`, `token`, `cache_dir` and similar. Others are ignored, as in PEFT.

        Raises:
            ValueError: there is no such configuration, or a file is damaged; the message names file and field.
        """
        return cls.reader(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def from_lora(cls, lora: LoraConfig, **fields: Any) -> PissaConfig:
        """Returns a configuration with the fields of a LoraConfig, copied, except `init_lora_weights`, and with these
        fields, which take precedence.

        Raises:
            TypeError, ValueError: a field is not supported; the message names it.
        """
        lora_fields = {f.name: copy.deepcopy(getattr(lora, f.name)) for f in dataclasses.fields(LoraConfig) if f.init}
        # Detected, so the value does not matter. axolotl gives None, which our files must not contain.
        lora_fields |= {"init_lora_weights": True, "fan_in_fan_out": bool(lora.fan_in_fan_out)}
        return cls(**lora_fields | fields)

    @property
    def form(self) -> Form:
        """The form in which the adapted layers keep their base."""
        if self.quant is not None:
            return Form.quantised(self.quant, self.double_quant)
        return Form(self.residual) if self.residual else IMPLICIT

    @property
    def starts_as_base(self) -> bool:
        """Whether the adapter's start is the one that a stored residual lacks, including alternations."""
        return self.repair is None

    @property
    def needs_calibration(self) -> bool:
        """Whether the base or the start depends on the layers' inputs."""
        return self.error_feedback or "activations" in (self.init, self.repair)

    def of_base(self) -> PissaConfig:
        """The configuration of the start that a stored residual lacks: this one, or one that starts as `repair`
        says."""
        if self.starts_as_base:
            return self
        fields: dict[str, Any] = {"init": self.repair, "repair": None, "use_dora": False}
        return dataclasses.replace(self, **fields)

    def of_adapter(self) -> PissaConfig:
        """The configuration of a start that no residual lacks, so without alternations and error feedback."""
        if self.repair is None and self.quant_iters == 1 and not self.error_feedback:
            return self
        return dataclasses.replace(self, repair=None, quant_iters=1, error_feedback=False)

    def as_lora(self, times: int = 2) -> LoraConfig:
        """The plain LoRA of `times` the rank with the same scaling in every layer."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig)}
        # s = alpha / r, or alpha / sqrt(r) with rsLoRA, must not change when r grows.
        grow = math.sqrt(times) if self.use_rslora and times > 1 else times
        fields["r"] = times * self.r
        fields["lora_alpha"] = grow * fields["lora_alpha"]
        fields["rank_pattern"] = {key: times * rank for key, rank in (self.rank_pattern or {}).items()}
        fields["alpha_pattern"] = {key: grow * alpha for key, alpha in (self.alpha_pattern or {}).items()}
        fields["inference_mode"] = True
        lora = LoraConfig(**fields)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(lora, name), set):
                setattr(lora, name, sorted(getattr(lora, name)))  # the same file every time
        return lora

    def _check_lora_fields(self) -> None:
        for f in dataclasses.fields(LoraConfig):
            default, value = default_of(f), getattr(self, f.name)
            if f.name not in SUPPORTED and value != default:
                raise ValueError(
                    f"{f.name}={value!r} is not supported with PiSSA; leave it out (default {default!r}), or "
                    f"use peft.LoraConfig for a plain LoRA adapter{_instead_of(value)} [P013]"
                )

    def _check_scaling(self) -> None:
        for name, rank in self._of_layers("r", "rank_pattern"):
            if not _is_int(rank) or rank < 1:  # PEFT's words
                raise ValueError(f"`{name}` should be a positive integer value but the value passed is {rank!r} [P014]")
        for name, alpha in self._of_layers("lora_alpha", "alpha_pattern"):
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
                raise ValueError(f"{name}: got {alpha!r}; allowed: a positive number (factors scale by 1/alpha) [P014]")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout!r}; allowed: 0 to 1, without 1 [P014]")

    def _of_layers(self, name: str, pattern: str) -> Iterator[tuple[str, Any]]:
        """Yields a field, and the values that a pattern has for some layers, under the names used in messages."""
        yield name, getattr(self, name)
        for key, value in (getattr(self, pattern) or {}).items():
            yield f"{pattern}[{key!r}]", value

    def _check_own_fields(self) -> None:
        others = (name for name in self.init_methods if name != "given")
        for name, methods in (("init", tuple(self.init_methods)), ("repair", (None, *others))):
            if getattr(self, name) not in methods:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; allowed: {', '.join(map(repr, methods))}, or a method of "
                    f"your own that you add to pissa.INIT_METHODS first{_instead_of(getattr(self, name))}"
                )
        check_seed(self.seed)
        check_choice("quant", self.quant, (None, *FORMATS))
        check_choice("quant_storage", self.quant_storage, get_args(Storage))
        check_choice("residual", self.residual, (None, *get_args(Residual)))
        for name in ("double_quant", "error_feedback", "merge_aware", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}; allowed: True, False")
        if not _is_int(self.quant_iters) or self.quant_iters < 1:
            raise ValueError(f"quant_iters: got {self.quant_iters!r}; allowed: an integer of at least 1")
        tokens = self.trainable_token_indices or []
        for index in itertools.chain(*tokens.values()) if isinstance(tokens, dict) else tokens:
            if not _is_int(index) or index < 0:
                raise ValueError(f"trainable_token_indices: got {index!r}; allowed: integers of at least 0")
        self._check_base()
        self._check_start()

    def _check_base(self) -> None:
        """Checks together the fields that describe a stored base."""
        if self.quant is not None and self.residual is not None:
            raise ValueError(
                f"residual: got {self.residual!r}; with quant={self.quant!r} the residual is kept in that format: "
                "leave residual out"
            )
        if self.repair is not None and self.form == IMPLICIT:
            raise ValueError(
                f"repair: got {self.repair!r} without a stored base, and no other lacks a start: give quant or "
                'residual="explicit" with it, or leave repair out'
            )
        if self.repair == self.init:
            self.repair = None
        if self.merge_aware and (self.form != IMPLICIT or self.use_dora or self.lora_dropout):
            raise ValueError(
                "merge_aware: got True together with quant, residual, use_dora or lora_dropout; it is for a low-rank "
                "change of a base that is codes: leave them out"
            )
        for name, needs_codes in (
            ("init", self.init == "activations"),
            ("repair", self.repair == "activations"),
            ("error_feedback", self.error_feedback),
            ("quant_iters", self.quant_iters > 1),
        ):
            if needs_codes and self.quant is None:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} without quant, and nothing else is quantised: give "
                    f"quant={' or '.join(map(repr, FORMATS))} with it, or leave {name} out [P032]"
                )

    def _check_start(self) -> None:
        """Checks what a start is combined with: that of the adapter, and that which a stored base lacks."""
        start = self.repair or self.init
        if self.error_feedback and self.quant_iters > 1 and start != "activations":
            raise ValueError(
                f"error_feedback: got True, but the start of {start!r} with quant_iters={self.quant_iters} is found "
                'with the nearest codes; allowed: False, or True with repair="activations", or with quant_iters=1'
            )
        # "given" is refused later, when an adapter is started.
        if self.quant_iters > 1 and start not in (*ALTERNATING, "given"):
            raise ValueError(
                f"quant_iters: got {self.quant_iters}, but the residual lacks the start of {start!r}; allowed: "
                f"1, or more with {' or '.join(map(repr, ALTERNATING))} as init or repair [P031]"
            )


PEFT_TYPE_TO_CONFIG_MAPPING[PissaType.PISSA] = PissaConfig  # for PeftConfig.from_pretrained on our files


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a configuration's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def is_all_linear(config: LoraConfig) -> bool:
    """Whether pissa is to choose the layers."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def exactly(name: str) -> str:
    """A key of `rank_pattern` and `alpha_pattern` that matches only the layer of that name. PEFT searches from the end
    of a name; the anchor prevents the pattern from matching any other name."""
    return f"^{re.escape(name)}"


def _refuse(target: nn.Module, adapter_name: str, **kwargs: Any) -> NoReturn:
    raise TypeError(
        "a PissaConfig needs pissa.wrap(model, config), or peft.get_peft_model, got one of PEFT's functions below "
        "them, which put layers into a model and cannot start an adapter [P012]"
    )


def _instead_of(init: object) -> str:
    """What to use instead of a start that PEFT has, for messages."""
    if init != "loftq":
        return ""
    return '. Instead of LoftQ, init="pissa" with quant="nf4" and quant_iters=5 starts from the error of the format'


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

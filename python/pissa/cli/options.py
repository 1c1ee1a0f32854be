"""The options of `pissa finetune` and `pissa dpo`: TRL's, with the paper's defaults, and the fields of PissaConfig."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Collection
from dataclasses import field, fields, make_dataclass
from typing import Any, get_type_hints

import trl
import yaml
from peft import LoraConfig
from trl import ModelConfig, ScriptArguments, TrlParser

import pissa
from pissa.cli.selftest import has_passed_on_gpu
from pissa.cli.terminal import UserError, number, positive_int, user_errors
from pissa.cli.training_options import RANK, SHORT, SHOWN, Option, rate_or_auto
from pissa.config import default_of
from pissa.ops.formats import FORMATS

# The fields of LoraConfig that mean the same for PiSSA and that the user may choose.
_STRUCTURES = ("rank_pattern", "alpha_pattern", "trainable_token_indices")
_NAMES = ("target_modules", "exclude_modules", "target_parameters", "layers_pattern", "modules_to_save")
_VALUES = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "layers_to_transform")
_NO_OPTIONS = {f.name for f in fields(LoraConfig)}.difference(_VALUES, _STRUCTURES, _NAMES) | {"seed"}  # the run's own
METHOD = {f.name: default_of(f) for f in fields(pissa.PissaConfig) if f.name not in _NO_OPTIONS}
"""The fields of PissaConfig that are options, and their defaults."""

# The paper's schedule (arXiv 2404.02948, section 5), and settings that suit a terminal. Its batch of 128 is for 100,000
# examples and more; our rates were found at 2 to 8 examples a step. An option of the method that is not given is None,
# except for switches.
_DEFAULTS: dict[str, Any] = {
    "max_length": 512,
    "num_train_epochs": 1.0,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "seed": 0,
    "per_device_eval_batch_size": None,
    "gradient_accumulation_steps": 1,
    "output_dir": "",
    "logging_steps": 1,
    "save_steps": 100,
    "save_total_limit": 2,
    "bf16": False,
    "gradient_checkpointing": None,
    "dtype": None,
    "use_cpu": not has_passed_on_gpu(),
    **{name: default if isinstance(default, bool) else None for name, default in METHOD.items()},
}
# For any task: on GSM8K and sums with SmolLM2-135M and Gemma 3 270M, rank 16 (bench/experiments), the mean loss is 0.68
# with PiSSA at 2e-4 and LoRA at 1e-3, and 0.69 with rsLoRA at 2e-4. At 5e-4, rsLoRA is better in three of the four, but
# fails in the fourth. The paper's 2e-5 is for 7 billion parameters and rank 128. With preferences, TRL's default stays.
_RATE, _LORAS_RATE = 2e-4, 1e-3
_BY_START = {"SFT": {"learning_rate": None}}
_structure = number(json.loads, 'JSON, such as {"q_proj": 8}', lambda value: isinstance(value, (dict, list)))
_TYPES: dict[str, Any] = {
    "r": positive_int,
    "quant_iters": positive_int,
    "layers_to_transform": list[int],
    "learning_rate": rate_or_auto,
    **dict.fromkeys(_STRUCTURES, _structure),
    **dict.fromkeys(_NAMES, list[str]),
}
_CHOICES = {
    "quant": tuple(FORMATS),
    "repair": tuple(name for name, method in pissa.INIT_METHODS.items() if not method.is_given),
}


def _fields(
    config: type, names: Collection[str], command: str = "finetune", **defaults: Any
) -> list[tuple[str, Any, Any]]:
    """Fields of a dataclass with our types, defaults, short names and, for a command, help. `defaults` replaces some of
    the defaults."""
    hints, options = get_type_hints(config), []
    defaults = _DEFAULTS | defaults
    for f in (f for f in fields(config) if f.name in names):
        shown = f" (default: {METHOD[f.name]})" if isinstance(METHOD.get(f.name), (str, int, float)) else ""
        help_of_field = f.metadata["help"].replace("%", "%%").replace("%%%%", "%%") + shown
        text = SHOWN[f.name].help_of(command) if f.name in SHOWN else help_of_field
        metadata: dict[str, Any] = {"help": text, "aliases": SHORT.get(f.name, [])}
        if choices := _CHOICES.get(f.name, f.metadata.get("choices")):
            metadata["choices"] = choices
        default = field(default=defaults.get(f.name, f.default), metadata=metadata)
        options.append((f.name, _TYPES.get(f.name, hints[f.name]), default))
    return options


def _own(option: Option) -> tuple[str, Any, Any]:
    default = option.default if option.metavar else False
    metadata: dict[str, Any] = {"help": option.text}
    return option.name, option.type if option.metavar else bool, field(default=default, metadata=metadata)


def trl_parser(trainer: str, **options: Any) -> TrlParser:
    """A parser for our options and those of one of TRL's trainers, "SFT" or "DPO"."""
    config = getattr(trl, f"{trainer}Config")
    ours = [
        *_fields(ModelConfig, ("model_name_or_path", "model_revision", "attn_implementation", "dtype")),
        *_fields(ScriptArguments, {f.name for f in fields(ScriptArguments)} - {"ignore_bias_buffers"}),
        *map(_own, (option for option in SHOWN.values() if option.is_ours)),
        *_fields(pissa.PissaConfig, METHOD),
    ]
    first = make_dataclass("Options", ours, namespace={"_argument_group_name": "model, data and method"})
    command = {"SFT": "finetune", "DPO": "dpo"}[trainer]
    changed = _fields(config, {*SHORT, *_DEFAULTS, *_TYPES}, command, **_BY_START.get(trainer, {}))
    training = make_dataclass("Training", changed, bases=(config,))
    parser = TrlParser((first, training), **options)
    parser.add_argument("--config", metavar="FILE", help=SHOWN["config"].text)
    return parser


def parse(args: Namespace, trainer: str) -> tuple[Any, Any]:
    """Returns our options and the trainer's, from `args.argv` and `args.config`."""
    file = ["--config", args.config] if args.config else []  # TRL looks for these two words
    with user_errors(OSError, ValueError, TypeError, yaml.YAMLError):
        ours, training, _ = trl_parser(trainer).parse_args_and_config([*args.argv, *file])
    # The options are pickled with each checkpoint, which is impossible for an object of a class that is defined here.
    training.__class__ = type(training).__base__
    training.per_device_eval_batch_size = training.per_device_eval_batch_size or training.per_device_train_batch_size
    return ours, training


def flag(name: str) -> str:
    """The spelling of an option in messages."""
    return SHORT.get(name, f"--{name.replace('_', '-')}")


def adapter_config(ours: Any, seed: int, split: pissa.PissaConfig | None = None) -> pissa.PissaConfig:
    """Returns the configuration that the options ask for. If the model is already split, its configuration applies: an
    option that contradicts it is refused, and the options are completed from it."""
    if ours.calibrate:
        ours.repair, ours.error_feedback = ours.repair or "activations", True
    # A switch that has its default is not given.
    values = {name: getattr(ours, name) for name, default in METHOD.items() if getattr(ours, name) is not default}
    given = {name: value for name, value in values.items() if value is not None} | {"r": ours.r or RANK}
    for name in ("target_modules", "exclude_modules"):
        # PEFT reads a string as an expression for whole names, and the names in a list as endings.
        match given.get(name):
            case [only] if only == "all-linear" or re.search(r"[^\w.]", only):
                given[name] = only
    with user_errors(TypeError, ValueError):
        config = split or pissa.PissaConfig(**given, seed=seed, task_type="CAUSAL_LM")
    for name, default in METHOD.items():
        given, value = getattr(ours, name), getattr(config, name)
        value = sorted(value) if isinstance(value, set) else value
        if split and given not in (None, value) and not (isinstance(given, bool) and given == default):
            split_with = f"{ours.model_name_or_path} was split with {flag(name)} {value}"
            raise UserError(f"{flag(name)} {given}: {split_with}; leave {flag(name)} out [P111]")
        setattr(ours, name, value)
    return config


def rate_of(config: pissa.PissaConfig) -> float:
    """The learning rate of a supervised training that does not name one."""
    return _LORAS_RATE if config.init == "lora" and not config.use_rslora else _RATE

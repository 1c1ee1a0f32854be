"""The options that the help of `pissa finetune` and `pissa dpo` shows, by what they are about. They are read here
without the packages that a training imports, which takes seconds; `options.py` adds all others, which are TRL's."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pissa.cli.terminal import (
    COLUMNS_HELP,
    THREADS_HELP,
    Parser,
    UserError,
    columns,
    count,
    minutes_of,
    number,
    positive_int,
    user_errors,
)

AUTO = "auto"
RANK = 16
"""Rank 64 lowers the loss on GSM8K by 0.026 ± 0.008 and takes 1.5 times as long. On films the difference was within
noise (bench/experiments, start-norm)."""
FORMATS = ("nf4", "int8", "mxfp4", "nvfp4", "int4", "fp8")
"""The names in ops.formats.FORMATS, for which torch is needed."""
INITS = ("pissa", "lora", "activations")
"""The names in base.init_methods.INIT_METHODS that may be asked for."""

PRECISIONS = ("float", "int8")
"""The values of PissaModel.precision."""

DTYPES = ("auto", "bfloat16", "float16", "float32")
"""The names that TRL takes."""

_above_0 = number(float, "a number above 0", lambda value: 0 < value < float("inf"))
_rate = number(float, f"a number above 0, or {AUTO}", lambda value: 0 < value < float("inf"))
_yes = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
_switch = number(lambda text: _yes.get(text.lower()), "true or false", lambda value: True)
_whole = number(int, "a whole number", lambda value: True)
_any_number = number(float, "a number", lambda value: True)


def rate_or_auto(text: str) -> Any:
    """A learning rate."""
    return text if text == AUTO else _rate(text)


def init_method(text: str) -> str:
    """The name of an init method. A program that calls `main` may have added some."""
    if text not in INITS and "pissa.base.init_methods" not in sys.modules:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {', '.join(INITS)}")
    return text


class Option(NamedTuple):
    """An option that the help shows."""

    name: str
    """Its long name, as in run.yaml."""
    text: str
    flag: str = ""
    """Its short name, if that is not the long one."""
    metavar: str | None = "N"
    """None for a switch."""
    type: Callable[[str], Any] = str
    choices: Sequence[str] | None = None
    is_ours: bool = False
    """Whether neither TRL nor PissaConfig has it."""
    default: Any = None
    """The default of one of ours."""
    text_of_dpo: str = ""
    """What it is in `pissa dpo`, where that differs."""

    def help_of(self, command: str) -> str:
        return (command == "dpo" and self.text_of_dpo) or self.text

    @property
    def flags(self) -> list[str]:
        """All spellings, the one that is shown first."""
        long = [f"--{self.name.replace('_', '-')}", f"--{self.name}"]
        return list(dict.fromkeys([*([self.flag] if self.flag else []), *long]))


GROUPS = {
    "model": (
        Option("model_name_or_path", "folder of a model, GGUF file, or name of either on the Hub", "--model", "MODEL"),
        Option("config_from", "model whose config.json a GGUF file uses, if it needs one", "", "MODEL", is_ours=True),
        Option("dtype", "bfloat16, float16 or float32 (default: the model's own)", "", "DTYPE", str, DTYPES),
        Option("quant", "keep the frozen weights in 4 or 8 bits: nf4, int8, fp8, ...", "", "FORMAT", str, FORMATS),
        Option("calibrate", "with --quant: fit the codes to the data", metavar=None, is_ours=True),
        Option("examples", "examples to fit them to (default: 64)", type=positive_int, is_ours=True, default=64),
    ),
    "data": (
        Option(
            "dataset_name", ".csv, .tsv, .jsonl, .json, .parquet, .txt, folder of texts, or data set", "--data", "DATA"
        ),
        Option("columns", COLUMNS_HELP, "", "NAME=COLUMN", columns, is_ours=True),
        Option("eval_data", "other data to hold out: not trained on, but measured", "", "DATA", is_ours=True),
        Option(
            "held_out", "examples of --data to hold out (default: a twentieth, 8 to 200)", "", "N", count, is_ours=True
        ),
        Option("max_length", "tokens at which longer examples are cut (default: 512)", type=positive_int),
    ),
    "method": (
        Option("init", f"start of the adapter: {', '.join(INITS)} (default: pissa)", "", "METHOD", init_method),
        Option("r", f"rank of the adapter (default: {RANK})", "--rank", "R", positive_int),
        Option("lora_alpha", "scaling of the adapter, times the rank (default: the rank)", "--alpha", "A", _above_0),
        Option("target_modules", "layers to adapt, by their names (default: all linear ones)", "", "NAME"),
        Option(
            "learning_rate",
            f"learning rate, or {AUTO} to find one (default: 2e-4; with --init lora 1e-3)",
            "--lr",
            "RATE",
            rate_or_auto,
            text_of_dpo=f"learning rate, or {AUTO} to find one (default: 1e-6)",
        ),
    ),
    "time": (
        Option("minutes", "longest time to train; limits the steps", "", "N", minutes_of, is_ours=True),
        Option("num_train_epochs", "passes over the data (default: 1)", "--epochs", "N", _above_0),
        Option("max_steps", "number of steps (default: by --epochs)", "--steps", "N", int),
        Option("per_device_train_batch_size", "examples in a batch (default: 8)", "--batch-size", "N", positive_int),
        Option("gradient_accumulation_steps", "batches in a step (default: 1)", "--grad-accum", "N", positive_int),
        Option("threads", THREADS_HELP, type=positive_int, is_ours=True),
        Option(
            "precision",
            "float, or int8: products of integers, faster on a CPU if the weights are in codes (default: float)",
            "",
            "KIND",
            str,
            PRECISIONS,
            is_ours=True,
            default=PRECISIONS[0],
        ),
        Option("seed", "seed of the data's order and of the start (default: 0)", type=int),
    ),
    "output": (
        Option("output_dir", "new folder for adapter and checkpoints (default: by model and data)", "--out", "FOLDER"),
        Option("resume", "go on with the run in --out, from its last checkpoint", metavar=None, is_ours=True),
        Option("json", "report as one JSON object on stdout", metavar=None, is_ours=True),
        Option("config", "YAML file of options, such as a run's run.yaml", metavar="FILE"),
    ),
}
SHOWN = {option.name: option for group in GROUPS.values() for option in group}
SHORT = {option.name: option.flag for option in SHOWN.values() if option.flag} | {"warmup_steps": "--warmup-ratio"}
"""The short names of options, by the long ones."""

_EVERYTHING = "--help-all"


class _OneLine(argparse.HelpFormatter):
    """Shows an option with its value, if it takes one, and none of its other spellings."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=100)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.nargs == "?" else str(action.metavar or "")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[-1]} {self._format_args(action, '')}".rstrip()


def parser_of(command: str) -> argparse.ArgumentParser:
    """Reads the options that are shown, each as None if it is not given."""
    usage = f"pissa {command} --model MODEL --data DATA [options]"
    parser = Parser(prog=f"pissa {command}", usage=usage, formatter_class=_OneLine)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            shown: dict[str, Any] = {"nargs": "?", "const": True, "type": _switch}
            if option.metavar:
                shown = {"type": option.type, "metavar": option.metavar, "choices": option.choices}
                shown |= {"nargs": "+"} if option.name == "target_modules" else {}
            group.add_argument(*reversed(option.flags), dest=option.name, help=option.help_of(command), **shown)
    parser.add_argument(_EVERYTHING, action="store_true", help="show every option, of TRL and transformers, too")
    return parser


def read(command: str, argv: Sequence[str]) -> argparse.Namespace | None:
    """The options that are shown, out of all arguments; None if the help on all options is wanted.

    Raises:
        UserError: a value that is not allowed, or an option that neither we nor TRL have.
    """
    parser = parser_of(command)
    given, others = parser.parse_known_args(argv)
    if given.help_all:
        return None
    if others and not others[0].startswith("-"):  # a later one may be the value of an option of TRL's
        quotes = ", with quotes around what contains a space"
        raise UserError(f"{others[0]}: belongs to no option; needed: {parser.usage}{quotes}; --help lists the options")
    known = names_elsewhere(command)
    for word in (word for word in others if re.match("--?[a-zA-Z]", word)):
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        begins_one = word.startswith("--") and any(each.startswith(name) for each in known)
        if name in _OTHER_NAMES or not begins_one:
            raise UserError(unknown_option(word, [option.flags[0] for option in SHOWN.values()], known))
    _parser_of_others(command).parse_known_args(argv)
    return given


_OTHER_NAMES = {"lora_r": "--rank", "lora_rank": "--rank", "lora_target_modules": "--target-modules"}
"""What other programs, TRL's among them, call some options."""


def read_file(command: str, path: str) -> dict[str, Any]:
    """The options in a file of options, by their long names; those that the help shows are checked.

    Raises:
        UserError: the file cannot be read, a value is not allowed, or there is no such option.
    """
    import yaml

    needed = "; needed: a file of options by their long names, such as a run's run.yaml"
    with user_errors(OSError, ValueError, yaml.YAMLError, before=f"--config {path}: ", after=needed):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no options")
    known = names_elsewhere(command)
    for name in map(str, values):
        if name not in {*SHOWN, *known, "env"}:  # TRL sets variables of the environment by env
            near = nearest(name, [*SHOWN], known)
            raise UserError(f"--config {path}: {name}: there is no such option{near and f'; did you mean {near}?'}")
    texts = {name: value for name, value in values.items() if isinstance(value, (str, int, float)) and value != ""}
    arguments = [f"--{name}={value}" for name, value in texts.items()]
    with user_errors(UserError, before=f"--config {path}: "):
        read, _ = parser_of(command).parse_known_args(arguments)
        _parser_of_others(command).parse_known_args(arguments)
    return values | {name: value for name, value in vars(read).items() if value is not None}


def nearest(name: str, *known: Collection[str]) -> str:
    """The nearest name in the first of these lists that has one near; otherwise an empty text."""
    return next(filter(None, (get_close_matches(name, names, 1) for names in known)), [""])[0]


def unknown_option(word: str, *known: Collection[str]) -> str:
    """The message on an option that there is not, with the nearest of the first of these lists that has one near."""
    name = word.partition("=")[0]
    lists = ([f"--{each.strip('-').replace('_', '-')}" for each in names] for names in known)
    plain = name.strip("-").replace("-", "_")
    near = _OTHER_NAMES.get(plain) or nearest(f"--{plain.replace('_', '-')}", *lists)
    return f"{name}: there is no such option{near and f'; did you mean {near}?'}; --help lists them"


@cache
def names_elsewhere(command: str) -> frozenset[str]:
    """The names of the options that TRL, transformers and PEFT define. Switches that are on have an opposite, which
    begins with no_."""
    names = {flag[2:].replace("-", "_") for flag in SHORT.values()} | _elsewhere(command).keys()
    return frozenset(names | {f"no_{name}" for name in names})


def _parser_of_others(command: str) -> argparse.ArgumentParser:
    """Reads those of these options whose values are known, by their whole names."""
    parser = Parser(allow_abbrev=False, add_help=False)
    for name, values in _elsewhere(command).items():
        if values and name not in SHOWN:
            parser.add_argument(*Option(name, "").flags, **values)
    return parser


@cache
def _elsewhere(command: str) -> dict[str, dict[str, Any]]:
    """The options of TRL, transformers and PEFT by name, and what argparse needs to know of their values, if they are
    numbers, switches or names. All is read from the sources, in 20 ms: importing them takes seconds."""
    trainer = {"finetune": "sft", "dpo": "dpo"}[command]
    places = {
        "transformers": ("training_args.py",),
        "peft": ("tuners/lora/config.py",),
        "trl": (*(f"trainer/{name}_config.py" for name in ("base", "model", trainer)), "scripts/utils.py"),
        "pissa": ("config.py",),
    }
    enumerations = dict[str, list[str]]()
    for text in _sources("transformers", ("trainer_utils.py", "training_args.py")):
        for name, members in re.findall(r"^class (\w+)\(ExplicitEnum\):\n((?:    .*\n|\n)+)", text, re.MULTILINE):
            enumerations[name] = re.findall(r'= "(\w+)"', members)
    found = dict[str, dict[str, Any]]()
    for package, files in places.items():
        for text in _sources(package, files):
            _, *fields = re.split(r"^    (\w+): ", text, flags=re.MULTILINE)
            found |= {name: _values(field, enumerations) for name, field in zip(fields[::2], fields[1::2], strict=True)}
    return found


def _sources(package: str, files: Collection[str]) -> Iterator[str]:
    """The texts of these files of a package, as far as it has them."""
    spec = find_spec(package)
    for folder in map(Path, spec.submodule_search_locations or ()) if spec else ():
        yield from ((folder / file).read_text(encoding="utf-8") for file in files if (folder / file).is_file())


_READ: dict[str, dict[str, Any]] = {
    "int": {"type": _whole},
    "float": {"type": _any_number},
    "bool": {"type": _switch, "nargs": "?"},
}
"""How values of these types are read."""


def _values(field: str, enumerations: Mapping[str, list[str]]) -> dict[str, Any]:
    """What the text of a field, from its type on, says of its values."""
    whole = field.partition("\n    )")[0]  # its last line, if it has several
    kind = whole.partition("\n")[0].partition(" = ")[0].removesuffix(" | None")
    names = re.findall(r'"choices": \[([^\]]+)\]', whole)
    choices = re.findall(r'"(\w+)"', names[0]) if names else enumerations.get(kind.removesuffix(" | str"))
    return {"choices": choices} if choices else _READ.get(kind, {})

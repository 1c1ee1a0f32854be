"""The command line: parses arguments, runs one command, and reports an error that the user can correct in one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any

from pissa.cli.early_checks import check_adapter, check_model, check_trained, check_training
from pissa.cli.terminal import Parser, UserError, busy_with, silence_third_parties
from pissa.cli.training_options import nearest, unknown_option
from pissa.containers.staged import CompletedError
from pissa.system import is_broken_pipe

# The commands and their help texts, by what they are for. Each command is a module of the same name, or what `_HOMES`
# names. It has `run(args)` and either `add_arguments(parser)` or the `trainer` of TRL whose options it takes. It is
# imported only when that command is given.
BY_PURPOSE = {
    "train": {
        "start": "ask for model, data and time, and propose a training run",
        "finetune": "fine-tune a causal language model on your data",
        "dpo": "train a causal language model on your preferences",
        "init": "split a checkpoint on disk into residuals and a LoRA, using little memory",
        "run": "run a PEFT training program with pissa's PiSSA and 4-bit LoRA",
    },
    "use what you have trained": {
        "chat": "ask a trained model and compare it with its base",
        "predict": "answer every row of a table with a trained model",
        "merge": "merge an adapter into a checkpoint on disk, using little memory",
        "export": "write an adapter for another runtime: bitsandbytes, vLLM, llama.cpp",
        "convert": "turn a PiSSA adapter of any layout into a plain LoRA",
    },
    "inspect and check": {
        "env": "report what is installed and whether its versions fit",
        "selftest": "check this installation; run it before you report a problem",
        "completion": "print the script by which a shell completes these commands",
    },
}
COMMANDS = {name: text for group in BY_PURPOSE.values() for name, text in group.items()}

_HOMES = {
    **{name: f"folders:{name.upper()}" for name in ("init", "merge", "export", "convert")},
    **{name: f"training:{name.upper()}" for name in ("finetune", "dpo")},
    "start": "guide",  # a module of that name is in base
}

# What an interrupted command leaves behind, if anything.
_INTERRUPTED = {
    "finetune": "a run that has begun goes on with --resume",
    "dpo": "a run that has begun goes on with --resume",
    "chat": "the conversation is not kept",
    "predict": "the same command goes on with it",
    "init": "the same command goes on with it",
    "merge": "the same command goes on with it",
    "export": "to bnb4, the same command goes on with it; else nothing is written",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `pissa` command with the given arguments. Without any, it takes the arguments of the process, and the
    process then belongs to the command (`args.is_process`). Returns 0 when the work is done, now or by an earlier run;
    1 when the environment or a check is broken; 2 for wrong input; 130 when interrupted by Ctrl-C or, in a training,
    by SIGTERM; 141 when its output is no longer read."""
    is_process = argv is None
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    command = argv[0]
    if is_process and isinstance(sys.stdout, io.TextIOWrapper):
        # Answers, tables and paths, in a locale of ASCII or of one script. Into a pipe or a file, Windows' Python would
        # write such a locale's bytes, too; to the console it writes UTF-8.
        encoding = "utf-8" if sys.platform == "win32" else None
        sys.stdout.reconfigure(encoding=encoding, errors="replace")
    try:
        if command not in (*COMMANDS, "-h", "--help", "--version"):
            near = nearest(command, COMMANDS, ("--help", "--version"))
            raise UserError(f"there is no such command{near and f'; did you mean {near}?'}; `pissa` lists them")
        if _HOMES.get(command, "").startswith("training") and check_training(command, argv[1:]):
            argv = [command, "--help"]
        args = _parsed(argv, argparse.Namespace(is_process=is_process, argv=argv[1:]))
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        message, code = str(error), 2
    except CompletedError as done:
        message, code = str(done), 0
    except ModuleNotFoundError as error:
        from pissa.cli.env import needed

        message, code = str(error), 2
        if error.name in needed():
            how = f"run `pip install {error.name}`, or install pissa[cli] [P002]"
            message = f"needs {error.name}, which is not installed: {how}"
        elif "pip install" not in message:
            raise
    except OSError as error:
        if not is_broken_pipe(error):  # what read the output, such as `head`, has ended
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at the end
        return 141
    except KeyboardInterrupt as stop:
        left = str(stop) or _INTERRUPTED.get(command, "nothing is written")
        message, code = f"interrupted; {left}", 130
    print(f"pissa {command}: {message}", file=sys.stderr)
    return code


def _parsed(argv: Sequence[str], args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a command. An option that it does not have is refused with the one whose name is nearest."""
    parser = parser_for(argv[:1])
    args, others = parser.parse_known_args(argv, args)
    if (wrong := next((word for word in others if word.startswith("-")), None)) is not None:
        raise UserError(unknown_option(wrong, [*commands_of(parser)[argv[0]]._option_string_actions]))
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    for action in commands_of(parser)[argv[0]]._actions:
        if action.dest in ("source", "adapter", "base") and (given := getattr(args, action.dest)) is not None:
            _PLACES.get(str(action.metavar), check_model)((action.option_strings or [str(action.metavar)])[0], given)
    return args


_PLACES: dict[str, Callable[[str, Any], None]] = {"RUN": check_trained, "ADAPTER": check_adapter}
"""What is checked of a path, by the name of its argument. All others are models."""


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by their names."""
    [commands] = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def parser_for(named: Collection[str]) -> argparse.ArgumentParser:
    """Returns a parser for all commands. Only the named commands get their arguments."""
    about = "Fine-tune language models on a CPU: LoRA and PiSSA, in 16, 8 or 4 bits."
    parser = _Commands(prog="pissa", description=about, epilog="pissa COMMAND --help says what a command takes.")
    parser.add_argument("--version", action="version", version=f"pissa {version('pissa')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in COMMANDS.items():
        home, module, own = _HOMES.get(name, name), None, dict[str, Any]()
        if name in named:
            with busy_with("starting"):
                if home.startswith("training"):
                    silence_third_parties()
                module = resolve_name(f"pissa.cli.{home}")
        if trainer := getattr(module, "trainer", None):
            from pissa.cli.options import trl_parser

            # argparse's own usage text would be a hundred lines long.
            usage = f"pissa {name} --model MODEL --data DATA [options]"
            own = {"parents": [trl_parser(trainer, add_help=False)], "usage": usage}
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=description, formatter_class=_ShowDefaults, **own)
        if module is not None:
            if not own:
                module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


class _Commands(Parser):
    """A parser whose help shows the commands by what they are for."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        [commands] = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        shown = {command.dest: command for command in commands._get_subactions()}
        groups = {title: [shown[name] for name in group] for title, group in BY_PURPOSE.items()}
        for title, actions in {**groups, "options": self._get_optional_actions()}.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _ShowDefaults(argparse.HelpFormatter):
    """Like argparse.ArgumentDefaultsHelpFormatter, but does not print the defaults "None" and "False", nor one that the
    help has."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = not any(action.default is none for none in (None, False, argparse.SUPPRESS)) and action.default != ""
        is_said = "(default: " in (action.help or "")
        return f"{action.help} (default: %(default)s)" if shown and not is_said else action.help

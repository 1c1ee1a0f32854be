"""`pissa start`: asks for a model, a file and the time there is, and proposes a training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from pissa.cli.terminal import (
    UserError,
    columns,
    has_terminal,
    minutes_of,
    number,
    silence_third_parties,
    user_errors,
)
from pissa.system import shell

_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_yes = number(lambda text: text.lower()[:1], "yes or no", lambda letter: letter in ("y", "n"))

Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Asks, prints the command, and runs it if that is wanted. Returns its exit code."""
    if not has_terminal():
        raise UserError(
            "asks in a terminal, and there is none; without it: pissa finetune --model MODEL --data FILE, or --help"
        )
    silence_third_parties()
    print("Three questions; an empty answer takes what is in brackets, and Ctrl-C ends.")
    name, of_model = _ask(f"Model: a folder, or a name on the Hugging Face Hub [{_MODEL}]", _open_model, _MODEL)
    _, of_data = _ask("Your data: a file of questions and answers, or of texts", _read)
    minutes, _ = _ask("Minutes that the training may take [30]", minutes_of, "30")
    command = ["finetune", "--model", name, "--minutes", minutes, *of_data, *of_model]
    print(f"\npissa {shell(*command)}\n")
    _, is_wanted = _ask("Start it? yes or no [yes]", _yes, "yes")
    if is_wanted == "n":
        return 0
    from pissa.cli import main

    return main(command)


def _ask(question: str, read: Callable[[str], Value], default: str = "") -> tuple[str, Value]:
    """Asks until `read` accepts the answer. Returns the answer, and what was read."""
    while True:
        try:
            answer = input(f"{question}: ").strip() or default
        except EOFError:
            raise KeyboardInterrupt from None
        try:
            return answer, read(answer)
        except (UserError, argparse.ArgumentTypeError) as error:
            print(f"  {error}")


# ---- The answers, and the proposal ----------------------------------------------------------------------------------


def _open_model(name: str) -> list[str]:
    """The options for a model: 4 bits if its weights, in 16 or 32, would fill more than half of the free memory."""
    from pissa.cli.memory import free_memory
    from pissa.containers.checkpoint import READ, Checkpoint, Contents

    with user_errors(OSError, ValueError, KeyError):
        source = Checkpoint.open(name)
        source.require(*READ)
    is_large = source.contents is Contents.DENSE and sum(map(source.nbytes, source.names)) > free_memory() / 2
    return ["--quant", "nf4", "--calibrate"] if is_large else []


def _read(answer: str) -> list[str]:
    """The options for a file, which may be followed by --columns: one pass over 500 examples or more, up to three over
    fewer."""
    from pissa.cli.data import read_chats
    from pissa.cli.sources import records

    file, _, mapping = answer.partition(" --columns ")
    if not file:
        raise UserError("a file is needed: .jsonl, .json, .csv, .tsv, .parquet or .txt")
    count = len(read_chats(records(file, columns(mapping) if mapping else None)))
    epochs = "1" if count >= 500 else "2" if count >= 200 else "3"
    return ["--data", file, *(["--columns", mapping] if mapping else []), "--rank", "16", "--epochs", epochs]

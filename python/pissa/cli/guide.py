"""`pissa start`: asks for a model, a file and the time there is, and proposes a training."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pissa.cli.terminal import UserError, number, silence_third_parties, user_errors

_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SHARE = 0.5
"""The share of the measured rate of products that a whole training step reaches (docs/speed.md: 0.6 to 1 of it)."""

_minutes = number(float, "a number of minutes, 1 or more", lambda minutes: 1 <= minutes < math.inf)
_yes = number(str.lower, "yes or no", lambda text: text in ("yes", "no"))

Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Asks, prints the command, and runs it if that is wanted. Returns its exit code."""
    if not sys.stdin.isatty():
        raise UserError(
            "asks in a terminal, and there is none; without it: pissa finetune --model MODEL --data FILE, or --help"
        )
    silence_third_parties()
    print("Three questions; an empty answer takes what is in brackets, and Ctrl-C ends.")
    name, model = _ask(f"Model: a folder, or a name on the Hugging Face Hub [{_MODEL}]", _open_model, _MODEL)
    data, examples = _ask("Your data: a file of questions and answers, or of texts", lambda text: _read(text, model))
    _, minutes = _ask("Minutes that the training may take [30]", _minutes, "30")
    command = ["finetune", "--model", name, "--data", data, *proposal(model, examples, minutes, _rate())]
    print(f"\npissa {shlex.join(command)}\n")
    _, is_wanted = _ask("Start it? yes or no [yes]", _yes, "yes")
    if is_wanted == "no":
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


# ---- The answers -----------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """What a proposal needs to know of a model."""

    parameters: int
    nbytes: int
    """The bytes of its files' tensors."""
    is_dense: bool
    """Whether its weights are in 16 or 32 bits, so that they can be quantised."""
    tokenizer: Any


def _open_model(name: str) -> Model:
    from transformers import AutoTokenizer

    from pissa.containers.checkpoint import READ, Checkpoint, Contents

    with user_errors(OSError, ValueError, KeyError):
        source = Checkpoint.open(name)
        source.require(*READ)
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        parameters = sum(parameter.numel() for parameter in source.model.parameters())
    nbytes = sum(source.nbytes(tensor) for tensor in source.names)
    return Model(parameters, nbytes, source.contents is Contents.DENSE, tokenizer)


def _read(file: str, model: Model) -> list[int]:
    """The numbers of tokens of the examples in a file."""
    from pissa.cli.data import encode, read_chats
    from pissa.cli.sources import records

    if not file:
        raise UserError("a file is needed: .jsonl, .json, .csv, .tsv, .parquet or .txt")
    rows, _, _ = encode(read_chats(records(file)), model.tokenizer, 512)
    return [len(row["input_ids"]) for row in rows]


# ---- The proposal ----------------------------------------------------------------------------------------------------


def proposal(model: Model, examples: list[int], minutes: float, rate: float) -> list[str]:
    """The options of a training that takes about so many minutes at most: one pass over 500 examples or more, up to
    three over fewer; at rank 16, for which the default rate was found; in 4 bits if the weights would fill more than
    half of the free memory. If there is no time for a pass, as many steps as there is time for.

    Args:
        examples: the number of tokens of each.
        rate: floating-point operations a second that products reach.
    """
    from pissa.cli.memory import free_memory

    a_pass = 4 * model.parameters * sum(examples) / (_SHARE * rate)  # two operations forward, two backward
    wanted = 1 if len(examples) >= 500 else 2 if len(examples) >= 200 else 3
    passes = min(wanted, int(60 * minutes / a_pass))
    steps = max(1, int(60 * minutes / a_pass * len(examples) / 8))
    options = ["--rank", "16", *(["--epochs", str(passes)] if passes else ["--steps", str(steps)])]
    if model.is_dense and model.nbytes > free_memory() / 2:
        options += ["--quant", "nf4", "--calibrate"]
    return options


def _rate() -> float:
    """Floating-point operations a second of a product as in a training step, measured for a quarter of a second."""
    import torch

    from pissa import ops

    x, weight = (torch.ones(rows, 1024, dtype=torch.bfloat16) for rows in (512, 2048))
    ops.linear(x, weight)  # the first one is slower
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < 0.25:
        ops.linear(x, weight)
        count += 1
    return 2 * count * 512 * 1024 * 2048 / seconds

"""What the command line has given to a training of the paper's size; with --quick, what stands in for it."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from bench.experiments.experiment import Options
from bench.experiments.paper import tiny

Kind = Literal["language", "encoder"]

TINY = "tiny"
"""The name of a model of --quick in the results."""


@cache
def given(options: Options, kind: Kind) -> Options:
    """The options themselves. With --quick: those that a run without it would have, of a tiny random model and a few
    rows of each data set, which the first call writes beside the results. `prepare` makes it, before cells run side by
    side."""
    if not options.quick:
        return options
    folder = options.trained / "quick"
    write = tiny.language_model if kind == "language" else tiny.encoder
    return replace(options, model=str(write(folder)), data=tuple(tiny.data(folder).items()), quick=False)


def model_name(options: Options) -> str:
    """What results call the model: the last part of a folder, or of a name on the hub.

    Raises:
        SystemExit: no model was given.
    """
    if options.quick:
        return TINY
    if options.model is None:
        raise SystemExit("needs a model: --model with a folder or a name on the hub, such as meta-llama/Llama-2-7b-hf")
    return Path(options.model).name


def device() -> torch.device:
    """The accelerator, or the CPU.

    Raises:
        SystemExit: several are visible. transformers' Trainer would take a batch for each of them.
    """
    if torch.accelerator.device_count() > 1:
        raise SystemExit(
            f"{torch.accelerator.device_count()} accelerators are visible; a cell needs one: set CUDA_VISIBLE_DEVICES=0"
        )
    # Of a build for CUDA the accelerator is cuda, also where there is none.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def from_environment(name: str, default: int) -> int:
    """A size that does not change results but by rounding.

    Raises:
        SystemExit: it is no number of 1 or more.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"the environment variable {name} is {text!r}; allowed: a number of 1 or more")
    return int(text)

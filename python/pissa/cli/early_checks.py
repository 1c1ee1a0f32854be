"""What is wrong with arguments and files, before the packages are imported that a command needs: that takes seconds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from pissa.cli.data import read_chats, read_preferences
from pissa.cli.sources import check_source, is_records, records
from pissa.cli.terminal import UserError, user_errors
from pissa.cli.training_options import read, read_file
from pissa.containers.staged import check_unused

_LOOKED_AT = 10_000
"""The records that are looked at, in 0.4 s; all are read later."""


def check_training(command: str, argv: Sequence[str]) -> bool:
    """Checks the arguments of `pissa finetune` or `pissa dpo` as far as that needs no weights. Returns whether the help
    on all options is wanted instead."""
    given = read(command, argv)
    if given is None:
        return True
    if given.config:
        values = read_file(command, given.config)
        for name in (name for name, value in vars(given).items() if value is None):
            setattr(given, name, values.get(name))
    for name, value in (("model", given.model_name_or_path), ("data", given.dataset_name)):
        if not value:
            raise UserError(f"--{name} is missing; needed: --model and --data")
    check_exists("--model", given.model_name_or_path)
    _check_out(given.output_dir, given.resume)
    for data in filter(None, (given.dataset_name, given.eval_data)):
        if is_records(data):
            check_source(data)
            if not given.resume and Path(data).suffix.lower() != ".parquet":  # which pyarrow reads
                form = read_preferences if command == "dpo" else read_chats
                form(itertools.islice(records(data, given.columns), _LOOKED_AT))
    return False


def _check_out(out: str | None, resume: bool | None) -> None:
    if resume and not out:
        raise UserError("--resume: --out is missing; needed: the folder of the run, or its run.yaml as --config")
    if resume and out and not (Path(out) / "run.yaml").is_file():
        raise UserError(f"--resume: {out} holds no run (run.yaml is missing); leave --resume out to start one [P099]")
    if out and not resume:
        with user_errors(ValueError, before="--out "):
            instead = "go on with that run by --resume, or " if (Path(out) / "run.yaml").is_file() else ""
            check_unused(Path(out), instead)


def check_exists(option: str, given: str | Path) -> None:
    """Refuses a path, or a text that looks like one and not like a name on the Hub, if nothing is there."""
    name, path, needed = str(given), Path(given), "a folder"
    if isinstance(given, str):
        needed = "a folder, a GGUF file, or a name on the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct"
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() == ".gguf"
        if not is_path or ":" in name:  # org/name:Q4_K_M is a file on the Hub
            return
    if not path.exists():
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        near = " or ".join(str(path.parent / each) for each in get_close_matches(path.name, names))
        raise UserError(
            f"{option} {name}: no such file or folder{near and f'; did you mean {near}?'}; needed: {needed}"
        )

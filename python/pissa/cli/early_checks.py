"""What is wrong with arguments and files, before the packages are imported that a command needs: that takes seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pissa.cli.data import read_chats, read_preferences
from pissa.cli.past_run import RUN_FILE, check_is_run, check_no_run
from pissa.cli.sources import Records, check_source, did_you_mean, is_records, records
from pissa.cli.templates import Chat
from pissa.cli.terminal import UserError, count_of, user_errors
from pissa.cli.training_options import read, read_file
from pissa.containers import recognise
from pissa.containers.recognise import has_adapter, has_model, is_gguf
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
    if given.calibrate and not given.quant:
        raise UserError("--calibrate: nothing is quantised, so nothing is fitted to data; give --quant nf4 with it")
    check_model("--model", given.model_name_or_path)
    _check_out(given.output_dir, given.resume)
    form = read_preferences if command == "dpo" else read_chats
    for data in filter(None, (given.dataset_name, given.eval_data)):
        if is_records(data) and given.resume:  # whose other options are compared first
            check_source(data)
        elif is_records(data):
            found = check_records(data, given.columns, form)
            # A plain text may become several examples.
            is_whole = 0 < len(found) < _LOOKED_AT and not any(isinstance(row, Chat) and row.is_text for row in found)
            if data == given.dataset_name and not given.eval_data and is_whole:
                check_held_out(given.held_out, len(found))
    return False


def check_held_out(count: int | None, examples: int) -> None:
    """Refuses to hold out all examples."""
    if count is not None and count >= examples:
        raise UserError(f"--held-out {count}: the data has {count_of(examples, 'example')}; allowed: fewer than that")


def check_records(
    data: str, columns: Mapping[str, str] | None, form: Callable[[Records], list[Any]] = read_chats
) -> list[Any]:
    """Refuses a file of records of another form, as far as its first records tell, which it returns."""
    check_source(data)
    if Path(data).suffix.lower() == ".parquet":  # which pyarrow reads
        return []
    return form(itertools.islice(records(data, columns), _LOOKED_AT))


def _check_out(out: str | None, resume: bool | None) -> None:
    if resume and not out:
        raise UserError("--resume: --out is missing; needed: the folder of the run, or its run.yaml as --config")
    if not out:
        return
    if resume:
        check_is_run(Path(out))
    else:
        with user_errors(ValueError, before="--out "):
            check_unused(Path(out), "go on with that run by --resume, or " if (Path(out) / RUN_FILE).is_file() else "")


def check_model(option: str, given: str) -> None:
    """Refuses the folder of a run or of an adapter, and any other without a model."""
    check_exists(option, given)
    folder = Path(given)
    if folder.is_dir() and not _has_model(folder):
        with user_errors(ValueError, before=f"{option} {given}: "):
            check_no_run(folder)
        raise UserError(f"{option} {given}: {_NO_MODEL}; needed: a folder that save_pretrained wrote [P085]")


def check_adapter(option: str, given: Path) -> None:
    """Refuses anything but an adapter's folder."""
    check_exists(option, given)
    with user_errors(ValueError):
        recognise.check_adapter(given)


def check_trained(option: str, given: str) -> None:
    """Refuses a folder without a model, and without an adapter."""
    check_exists(option, given)
    folder = Path(given)
    if folder.is_dir() and not (has_adapter(folder) or _has_model(folder)):
        raise UserError(
            f"{option} {given}: {_NO_MODEL}; there is no adapter either: a run that has not ended has it in its last "
            "checkpoint-N [P113]"
        )


_NO_MODEL = "holds no model: there is neither config.json nor a GGUF file"


def _has_model(folder: Path) -> bool:
    return has_model(folder) or any(map(is_gguf, folder.iterdir()))


def check_exists(option: str, given: str | Path) -> None:
    """Refuses a path, or a text that looks like one and not like a name on the Hub, if nothing is there."""
    name, path, needed = str(given), Path(given), "a folder"
    if isinstance(given, str):
        needed = "a folder, a GGUF file, or a name on the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct"
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() == ".gguf"
        if ":" in name or (name.count("/") == 1 and not is_path):  # org/name:Q4_K_M is a file on the Hub
            return
        if not is_path and not path.exists():  # a few models on the Hub, such as gpt2, are named like this
            from pissa.containers.hub import check_is_there

            with user_errors(ValueError, before=f"{option} {name}: no such file or folder{did_you_mean(path)}; "):
                check_is_there(name)
            return
    if not path.exists():
        raise UserError(f"{option} {name}: no such file or folder{did_you_mean(path)}; needed: {needed}")

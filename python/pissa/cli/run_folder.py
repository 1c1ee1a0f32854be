"""The folder of a run: taken by one run alone, with its options and a digest of its data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from pissa.base.digest import xxh3_of_text
from pissa.cli.options import METHOD, flag
from pissa.cli.past_run import RUN_FILE, check_is_run
from pissa.cli.terminal import UserError, user_errors
from pissa.cli.training_options import AUTO
from pissa.containers.messages import file_errors, read_object
from pissa.containers.staged import check_unused, staged, write_text
from pissa.distributed import RankError, agree, failing_together

DATA_FILE = "data.json"

LIMITS = ("minutes", "max_steps", "num_train_epochs")
"""The options that say how long a run trains."""

MAY_CHANGE = {
    "how long it trains": LIMITS,
    "from where it goes on": ("resume", "resume_from_checkpoint"),
    "where it writes": ("output_dir", "push_to_hub", "hub_*"),
    "when it saves and evaluates": ("save_*", "do_eval", "eval_st*", "eval_on_start", "per_device_eval_batch_size"),
    "what it reports": (
        *("json", "report_to", "run_name", "project", "trackio_*"),
        *("disable_tqdm", "logging_*", "log_*"),
    ),
    "how the machine computes": ("threads", "dataloader_*", "ddp_*", "fsdp*", "gradient_checkpointing*"),
}
"""What a resumed run may change, and the options of that; a star stands for the rest of a name. All others have to be
as they were."""


# ---- Taking it -------------------------------------------------------------------------------------------------------


@contextmanager
def taken_folder(ours: Any, training: Any) -> Iterator[None]:
    """Makes the folder of a new run, with run.yaml in it, so that no other run takes it; without --out, in the working
    directory under a name that nothing there has. Of several processes the main one does it. If nothing else has been
    written by the end of the block, both are gone again.

    Raises:
        UserError: the folder is in use, or cannot be made.
    """
    made: list[Path] = []
    with user_errors(ValueError, OSError, RankError, before="--out "), failing_together():
        if training.process_index == 0:
            made += _make(ours, training)
        training.output_dir = agree(training.output_dir)[0]
    try:
        yield
    finally:
        if made:
            _remove(*made)


def _make(ours: Any, training: Any) -> list[Path]:
    """Returns what it has made, the innermost first: run.yaml, and the folders that did not exist."""
    if training.output_dir:
        out = Path(training.output_dir)
        check_unused(out, "go on with that run by --resume, or " if (out / RUN_FILE).is_file() else "")
        folders = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
    else:
        model, data = (Path(os.path.abspath(given)) for given in (ours.model_name_or_path, ours.dataset_name))
        out = _new_folder(f"{model.name}-{data.stem}")
        training.output_dir, folders = str(out), [out]
    try:
        with open(out / RUN_FILE, "x", encoding="utf-8", newline="\n") as file:
            file.write(_as_yaml(ours, training))
    except FileExistsError:
        raise ValueError(f"{out}: another run has just taken it; choose a new one [P065]") from None
    return [out / RUN_FILE, *folders]


def _new_folder(name: str) -> Path:
    """Makes a folder under the first name that nothing in this directory has."""
    free, number = Path(name), 1
    while True:
        try:
            free.mkdir()
            return free
        except FileExistsError:
            number += 1
            free = Path(f"{name}-{number}")


def _remove(run_file: Path, *folders: Path) -> None:
    """Removes run.yaml and the folders, unless there is something else in them by now."""
    with suppress(OSError):  # another program has removed them, or put something there
        if [path.name for path in run_file.parent.iterdir()] == [RUN_FILE]:
            run_file.unlink()
            for folder in folders:
                folder.rmdir()


def check_names(**names: str | None) -> None:
    """Refuses file names of other bytes than UTF-8, which neither the files of a run nor a terminal can hold. They are
    given by the options that have them."""
    for option, name in names.items():
        given = os.fsencode(name or "")  # in a locale of ASCII, Python has not decoded what is UTF-8
        try:
            given.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{flag(option)}: the name {given!r} is not UTF-8, in which a run names its files; rename it, or give "
                "another name"
            ) from error


# ---- What a run is ---------------------------------------------------------------------------------------------------


def record(out: Path, digests: dict[str, str], *options: Any) -> None:
    """Writes run.yaml, which --config reads, once all options are known, and the digests of the data."""
    with staged(out) as new:
        write_text(new(DATA_FILE), json.dumps(digests))
        write_text(new(RUN_FILE), _as_yaml(*options))


def check_same_run(out: Path, ours: Any, training: Any) -> None:
    """Checks that a folder contains a run with the same options, except for those that may change, or names each one
    that differs. A rate that is to be found becomes the rate that the run used."""
    check_is_run(out)
    # A run of an earlier version may have recorded fewer options of the method.
    before = METHOD | _recorded(out)
    if training.learning_rate == AUTO:
        training.learning_rate = before.get("learning_rate", AUTO)
    now = _as_dict(ours, training)
    if names := [name for name in now if not _may_change(name) and before.get(name) != now[name]]:
        what = "; ".join(f"{flag(name)} was {before.get(name)}, is {now[name]}" for name in names)
        raise UserError(f"--resume: {out} holds another run: {what}; give the same options or another --out [P099]")


def _may_change(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for patterns in MAY_CHANGE.values() for pattern in patterns)


def _recorded(out: Path) -> dict[str, Any]:
    """The options of the run in a folder, by name."""
    needed = "Needed: options by name; leave --resume out and give another --out to start anew"
    with user_errors(ValueError), file_errors(out / RUN_FILE, needed):
        return dict(yaml.safe_load((out / RUN_FILE).read_text(encoding="utf-8")))


class Limits:
    """How long a run trains by its options, and whether they differ from what its folder has recorded."""

    def __init__(self, out: Path, ours: Any, training: Any) -> None:
        self._out, recorded, now = out, _recorded(out), _as_dict(ours, training)
        self._values = {name: now[name] for name in LIMITS}
        self.are_new = any(recorded.get(name) != value for name, value in self._values.items())

    def record(self) -> None:
        """Writes them to the folder. Once a checkpoint has been made within new limits, the run goes on within them."""
        with staged(self._out) as new:
            text = yaml.safe_dump(_recorded(self._out) | self._values, sort_keys=False)
            write_text(new(RUN_FILE), text)


def digests_of(train: Any, held_out: Any) -> dict[str, str]:
    """Digests of encoded examples in their order. Data that are only encoded when they are read have none: streams, and
    images, for which the digest would change with their cache."""
    parts = {"training": train, "held-out": held_out}
    return {
        name: xxh3_of_text("\n".join(xxh3_of_text(json.dumps(row, sort_keys=True)) for row in rows))
        for name, rows in parts.items()
        if isinstance(rows, Dataset) and not {*rows.column_names} & {"image", "images"}
    }


def check_same_data(out: Path, digests: dict[str, str]) -> None:
    """Checks that a run goes on with the examples with which it began. A run of an earlier version has no digests."""
    path = out / DATA_FILE
    if not path.is_file():
        return
    needed = "Needed: digests by name; leave --resume out and give another --out to start anew"
    with user_errors(ValueError), file_errors(path, needed):
        before = read_object(path)
    if changed := [name for name, digest in digests.items() if before.get(name) != digest]:
        what = " and ".join(changed)
        raise UserError(
            f"--resume: {out} began with other examples: the {what} data, or the tokenizer, have changed since; give "
            "those with which it began, or another --out to start anew [P099]"
        )


def _as_yaml(*options: Any) -> str:
    return str(yaml.safe_dump(_as_dict(*options), sort_keys=False))


def _as_dict(*options: Any) -> dict[str, Any]:
    """All options by name, as JSON and YAML store them, except those that concern only this machine."""
    values = {f.name: getattr(part, f.name) for part in options for f in fields(part) if f.init}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=vars))
    return {name: value for name, value in plain.items() if name not in ("hub_token", "use_cpu")}

"""The folder of a run: whether it is new or can be resumed, and run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pissa.cli.terminal import UserError
from pissa.files.staged import Staged, check_unused

RUN_FILE = "run.yaml"
PICTURE_FILE = "loss.png"

# Beginnings of the options that a resumed run may have otherwise: where it writes, what it reports, when it evaluates.
_FREE = (
    *(
        "output_dir",
        "resume",
        "json",
        "report_to",
        "run_name",
        "project",
        "trackio",
        "disable_tqdm",
        "logging_",
        "log_",
    ),
    *("save_", "eval_s", "eval_on", "per_device_eval", "hub_", "push_to_hub", "dataloader_", "ddp_", "fsdp"),
)


def check_new_folder(out: Path) -> None:
    """Refuses a folder that is in use.

    Raises:
        UserError: `out` is a file, or a folder that is not empty.
    """
    try:
        check_unused(out, "go on with that run by --resume, or " if (out / RUN_FILE).is_file() else "")
    except ValueError as error:
        raise UserError(f"--out {error}") from error


def recorded(out: Path) -> dict[str, Any]:
    """The options of the run that a folder holds.

    Raises:
        UserError: it holds none.
    """
    import yaml

    if not (out / RUN_FILE).is_file():
        raise UserError(f"--resume: {out} holds no run ({RUN_FILE} is missing); leave --resume out to start one")
    options: dict[str, Any] = yaml.safe_load((out / RUN_FILE).read_text())
    return options


def check_same(out: Path, options: dict[str, Any]) -> None:
    """Refuses to go on with a run that had other options.

    Raises:
        UserError: naming every option that differs.
    """
    from pissa.cli.options import flag

    before = recorded(out)
    names = [name for name in options if not name.startswith(_FREE) and before.get(name) != options[name]]
    if names:
        what = "; ".join(f"{flag(name)} was {before.get(name)}, is {options[name]}" for name in names)
        raise UserError(f"--resume: {out} holds another run: {what}; give the same options or another --out")


def record(out: Path, options: dict[str, Any]) -> None:
    """Makes the folder and writes run.yaml, which --config takes."""
    import yaml

    with Staged(out) as staged:
        staged.path(RUN_FILE).write_text(yaml.safe_dump(options, sort_keys=False))


def last_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint. The Trainer writes trainer_state.json last, so only a complete one has it."""
    complete = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

"""The folder of a run: new or to be resumed, and what it records of itself."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pissa.cli.errors import UserError

RUN_FILE = "run.json"
PICTURE_FILE = "loss.png"

# Of the arguments, those that decide what is trained: a resumed run must have the same.
_IDENTITY = (
    *("model", "data", "eval_data", "max_length", "method", "quant", "rank", "svd", "svd_passes", "dtype"),
    *("steps", "epochs", "lr", "warmup_ratio", "batch_size", "grad_accum", "seed"),
)


def check_new_folder(out: Path) -> None:
    """Refuses a folder in which something could be overwritten.

    Raises:
        UserError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; needed: a new folder")
    if out.is_dir() and (files := sorted(path.name for path in out.iterdir())):
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        how = "go on with that run by --resume, or choose" if RUN_FILE in files else "choose"
        raise UserError(f"--out {out} is not empty ({shown}) and nothing is overwritten; {how} a new folder")


def check_resumable(args: argparse.Namespace) -> None:
    """Refuses to go on with what is no run, or with a run that had other arguments.

    Raises:
        UserError: naming every argument that differs.
    """
    path = args.out / RUN_FILE
    if not path.is_file():
        raise UserError(f"--resume: {args.out} holds no run ({RUN_FILE} is missing); leave --resume out to start one")
    recorded, now = json.loads(path.read_text()), _identity(args)
    changed = [name for name in _IDENTITY if recorded.get(name) != now[name]]
    if changed:
        what = "; ".join(f"--{name.replace('_', '-')} was {recorded.get(name)}, is {now[name]}" for name in changed)
        raise UserError(f"--resume: {args.out} holds another run: {what}; give the same arguments or another --out")


def record_run(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Makes the folder and writes run.json: the arguments that decide what is trained, and `facts`."""
    args.out.mkdir(parents=True, exist_ok=True)
    staged = args.out / (RUN_FILE + ".tmp")
    staged.write_text(json.dumps(_identity(args) | facts, indent=2) + "\n")
    os.replace(staged, args.out / RUN_FILE)


def last_checkpoint(out: Path) -> Path | None:
    """The last complete one: the Trainer writes trainer_state.json when everything else is written."""
    complete = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, from the folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _IDENTITY}

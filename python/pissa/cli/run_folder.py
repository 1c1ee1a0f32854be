"""The folder of a run: whether it is new or can be resumed, and run.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pissa.cli.terminal import UserError
from pissa.files.staged import Staged, check_unused

RUN_FILE = "run.json"
PICTURE_FILE = "loss.png"

# The arguments that decide what is trained. A resumed run must have the same.
_IDENTITY = (
    *("model", "data", "eval_data", "max_length"),
    *("method", "quant", "quant_iters", "rank", "svd", "svd_passes", "dtype"),
    *("steps", "epochs", "lr", "warmup_ratio", "batch_size", "grad_accum", "seed"),
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


def check_resumable(args: argparse.Namespace) -> None:
    """Refuses to resume in a folder that holds no run, or a run with other arguments.

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
    with Staged(args.out) as staged:
        staged.path(RUN_FILE).write_text(json.dumps(_identity(args) | facts, indent=2) + "\n")


def last_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint. The Trainer writes trainer_state.json last, so only a complete one has it."""
    complete = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written; its folder's name says it."""
    return int(checkpoint.name.rpartition("-")[2])


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _IDENTITY}

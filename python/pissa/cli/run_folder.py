"""The folder of a run: whether it is new or can be resumed."""

from __future__ import annotations

from pathlib import Path

from pissa.cli.terminal import told
from pissa.files.staged import check_unused

RUN_FILE = "run.yaml"
PICTURE_FILE = "loss.png"


def check_new_folder(out: Path) -> None:
    """Refuses a folder that is in use.

    Raises:
        UserError: `out` is a file, or a folder that is not empty.
    """
    with told(ValueError, before="--out "):
        check_unused(out, "go on with that run by --resume, or " if (out / RUN_FILE).is_file() else "")


def last_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint. The Trainer writes trainer_state.json last, so only a complete one has it."""
    complete = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

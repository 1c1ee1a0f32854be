"""What the folder of a run says to any command: how to go on with it, and its last checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pissa.cli.terminal import UserError
from pissa.containers.messages import quote, read_object
from pissa.containers.recognise import ADAPTER_CONFIG, has_adapter, has_model
from pissa.system import shell

RUN_FILE = "run.yaml"
"""The file with the options of a run."""


def check_is_run(folder: Path) -> None:
    """Raises UserError if there is no run to go on with."""
    if not (folder / RUN_FILE).is_file():
        raise UserError(
            f"--resume: {folder} holds no run ({RUN_FILE} is missing); leave --resume out to start one [P099]"
        )


def check_no_run(folder: Path) -> None:
    """Raises ValueError, saying how to go on, if it is the folder of a run or of an adapter that stands in the place of
    a model's."""
    run = folder / RUN_FILE
    if has_model(folder) or not (run.is_file() or has_adapter(folder)):
        return
    what, ways = "an adapter", []
    if run.is_file():
        trains = (
            "dpo" if "\nbeta:" in run.read_text(encoding="utf-8", errors="replace") else "finetune"
        )  # which has no such option
        what, ways = "a run", [f"to continue it: `{resume_command(f'pissa {trains}', folder)}`"]
    if adapter := folder if has_adapter(folder) else last_checkpoint(folder):
        has_base = read_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
        words = ["pissa", "merge", str(adapter), "NEW_FOLDER", *([] if has_base else ["--base", "BASE"])]
        ways.append(f"to train on from what it has learned: `{shell(*words)}`, then give NEW_FOLDER as the model")
    raise ValueError(f"it is the folder of {what}, not of a model; {'; '.join(ways)} [P128]")


def resume_command(command: str, out: Path) -> str:
    """What to type, so that a run of `command`, such as "pissa finetune", goes on."""
    return f"{command} --config {shell(str(out / RUN_FILE))} --resume"


def last_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint. The Trainer writes trainer_state.json last, so only a complete one contains it.

    Raises:
        UserError: a folder is named almost like a checkpoint. The Trainer would count it as one, and delete it.
    """
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in out.glob("checkpoint-*")}
    if others := sorted(path.name for path, number in numbers.items() if not number):
        raise UserError(
            f"--resume: {out} contains {quote(others[0])}, which would be deleted as an old checkpoint; give it a name "
            "that does not begin with checkpoint-, or move it elsewhere [P099]"
        )
    complete = {int(number[1]): path for path, number in numbers.items() if number and _is_complete(path)}
    return complete[max(complete)] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (FileNotFoundError, ValueError):  # it is cut where the disk was full
        return False
    return True

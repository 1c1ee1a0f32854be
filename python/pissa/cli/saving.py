"""How a run is saved: without pickles that nothing reads, and if its disk refuses, with a word on what is kept."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME

from pissa.cli.past_run import last_checkpoint, resume_command
from pissa.cli.progress import LossBar
from pissa.cli.terminal import UserError, as_size
from pissa.containers.messages import first_line


def save_safely(trainer: Any, command: str) -> None:
    """Lets a Trainer save so whenever it does."""
    trainer._save = partial(_save, trainer._save, trainer.args)
    trainer._save_checkpoint = errors_of_saving(trainer, command)(trainer._save_checkpoint)


def _save(save: Callable[..., None], training: Any, folder: str | None = None, **state: Any) -> None:
    """Saves as the Trainer does, but no pickle of its options, which nothing reads: the folder may be given away."""
    save(folder, **state)
    if training.should_save:
        Path(folder or training.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)


@contextmanager
def errors_of_saving(trainer: Any, command: str) -> Iterator[None]:
    """Turns an error of the file system in the block into a UserError that says what is kept, and how to go on."""
    try:
        yield
    except Exception as error:
        if not _is_of_writing(error):
            raise
        if (bar := trainer.pop_callback(LossBar)) and bar.training_bar is not None:
            bar.training_bar.close()  # which would be drawn again after the message
        out = Path(trainer.args.output_dir)
        file, reason = getattr(error, "filename", None) or out, getattr(error, "strerror", None) or first_line(error)
        remedy = f"{as_size(shutil.disk_usage(out).free)} are free there; free some space, or correct that reason"
        if os.strerror(errno.EMFILE) in reason:
            remedy = "raise the limit, such as by `ulimit -n 4096`"
        last = last_checkpoint(out)
        kept = f"the last complete checkpoint, {last}, is kept" if last else "no checkpoint is complete"
        go_on = resume_command(command, out)
        raise UserError(f"{file} cannot be written: {reason}; {kept}; {remedy}, then go on by: {go_on}") from error


def _is_of_writing(error: Exception) -> bool:
    """Whether an error is one of the file system, for which safetensors and torch have classes that do not say so."""
    words = ("I/O error", "inline_container", "iostream error")
    is_other = isinstance(error, SafetensorError | RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, OSError) or is_other

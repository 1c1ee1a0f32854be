"""The metrics of a run: metrics.jsonl, and a progress bar that shows the loss."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from pissa.files.staged import Staged

METRICS_FILE = "metrics.jsonl"


def peak_memory_mib() -> float:
    """Highest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its maximum survives exec, so a child would start with that of the process that made it.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; [] without the file."""
    path = folder / METRICS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def truncate_metrics(folder: Path, last_step: int) -> None:
    """Drops the rows that a run repeats when it resumes after `last_step`, and a line that was cut off."""
    path = folder / METRICS_FILE
    kept = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] < last_step or (row["step"] == last_step and "loss" in row):
            kept.append(line + "\n")
    with Staged(folder) as staged:
        staged.path(METRICS_FILE).write_text("".join(kept))


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Appends one JSON object for each logged step (step, loss, learning_rate, seconds, peak_memory_mib) and one
    for each evaluation (step, eval_loss)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        self.started = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        row: dict[str, Any] = {"step": state.global_step}
        if "eval_loss" in logs:
            row |= {"eval_loss": logs["eval_loss"]}
        elif "loss" in logs:
            row |= {"loss": logs["loss"], "learning_rate": logs["learning_rate"]}
            row |= {"seconds": round(self.seconds, 4), "peak_memory_mib": round(peak_memory_mib(), 1)}
        else:  # the Trainer's own summary at the end
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class LossBar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bars with names and the loss. ProgressCallback prints a line on stdout for each step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description("training", refresh=False)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_prediction_step(args, state, control, **kwargs)
        self.prediction_bar.set_description("held out", refresh=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

"""What a run shows and notes while it trains, and how it stops."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


def peak_memory_mib() -> float:
    """Highest memory so far, in MiB: what a GPU has allocated, without one what is resident of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if (status := Path("/proc/self/status")).is_file():
        # Not getrusage: its maximum survives exec, so a child would start with that of the process that made it.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


class Costs(TrainerCallback):  # type: ignore[misc]
    """Notes `seconds` of the step and `peak_memory_mib` with each logged loss, in trainer_state.json."""

    started = seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            costs = {"seconds": round(self.seconds, 4), "peak_memory_mib": round(peak_memory_mib(), 1)}
            state.log_history[-1].update(costs)


class LossBar(ProgressCallback):  # type: ignore[misc]
    """One progress bar, with the loss. ProgressCallback has a second one, and prints a line for each step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training", refresh=False)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is None:
            super().on_prediction_step(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)


class CompleteError(Exception):
    """All steps of a run have been made."""


class EndIfComplete(TrainerCallback):  # type: ignore[misc]
    """Ends a training that is resumed behind its last step. Trainer makes one more, in an epoch that has more batches.

    Raises:
        CompleteError: out of `train`, when the checkpoint has been loaded.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise CompleteError


class SaveAndStop(TrainerCallback):  # type: ignore[misc]
    """At Ctrl-C the step is finished, a checkpoint written, and the training ends. A second one ends it at once."""

    requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes Ctrl-C for the block."""
        before = signal.signal(signal.SIGINT, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _request(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nending after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True

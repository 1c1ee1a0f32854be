"""What `pissa finetune` and `pissa dpo` do while they train: the bar, the costs of each step, Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from pissa.cli.cores import Threads
from pissa.cli.memory import peak_memory


def tokens_per_second(history: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second, without padding, of the logged steps; 0 where TRL does not count tokens."""
    steps = [row for row in history if "loss" in row and "num_tokens" in row and "seconds" in row]
    if len(steps) < 2:  # a single one contains only the sum, with everything before it
        return 0.0
    seconds = sum(row["seconds"] * (row["step"] - before["step"]) for before, row in pairwise(steps))
    return float(steps[-1]["num_tokens"] - steps[0]["num_tokens"]) / seconds if seconds else 0.0


class LossBar(ProgressCallback):  # type: ignore[misc]
    """A progress bar with tokens per second, the loss and the latest held-out loss, which fits 80 columns: tqdm cuts
    what does not, and a number that is cut is another one. ProgressCallback prints a line for each step."""

    _held_out = ""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training", refresh=False)
            self.training_bar.bar_format = "{desc}{n_fmt}/{total_fmt} |{bar}| [{elapsed}<{remaining}{postfix}]"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "eval_loss" in logs:
            self._held_out = f", held out {logs['eval_loss']:.3f}"
        if self.training_bar is not None and "loss" in logs:
            speed = f"{rate:,.0f} tokens/s, " if (rate := tokens_per_second(state.log_history)) else ""
            self.training_bar.set_postfix_str(f"{speed}loss {logs['loss']:.3f}{self._held_out}", refresh=False)


class CompleteError(Exception):
    """All steps of a run are done."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Records the `seconds` per step and `peak_memory_mib` with each logged loss, in trainer_state.json. After a call
    of `stop`, the step is finished, a checkpoint is written, and the training ends. Calls `after_save` after each
    checkpoint, and chooses the number of `threads` after each evaluation.

    Raises:
        CompleteError: from `train`, after the checkpoint has been loaded, if the run is resumed after its last step.
            Trainer would make one more step in an epoch that has more batches.
    """

    after_save: Callable[[], None] | None = None
    requested = False
    started = seconds = 0.0

    def __init__(self, threads: Threads) -> None:
        self.threads = threads

    def stop(self) -> None:
        """Ends the training after this step."""
        self.requested = True
        print("\nending after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise CompleteError

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.started
        if self.requested:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        with tqdm.external_write_mode():  # what it says
            self.threads.choose()

    def on_save(self, *_: Any, **__: Any) -> None:
        if self.after_save is not None:
            self.after_save()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            costs = {"seconds": round(self.seconds, 4), "peak_memory_mib": round(peak_memory() / 2**20, 1)}
            state.log_history[-1].update(costs)

"""python killed_cells.py FOLDER: starts cells of paper-nlg and paper-nlu with --quick, and kills each on its way.

FOLDER gets what they leave, in a folder for each place that they are killed at.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from bench.experiments.experiment import Cell, Options
from bench.experiments.paper.glue_tuning import GlueTuning
from bench.experiments.paper.instruction_tuning import InstructionTuning

RATE = 1e-2
"""At which three steps change a tiny model."""
PISSA, FULL, GLUE = (
    InstructionTuning("tiny", "metamath", "pissa", RATE),
    InstructionTuning("tiny", "metamath", "full", RATE),
    GlueTuning("tiny", "rte", "pissa"),
)


def in_step(number: int) -> None:
    """In the number-th batch, before its gradients."""
    step, count = Trainer.training_step, 0

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    Trainer.training_step = training_step


def at_the_end() -> None:
    """After the last checkpoint, before the result is saved."""
    Trainer.evaluate = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)


PLACES: dict[str, tuple[Cell, Callable[[], None], int]] = {
    "PiSSA, step 3": (PISSA, lambda: in_step(3), 2),
    "PiSSA, end": (PISSA, at_the_end, 3),
    "full, step 3": (FULL, lambda: in_step(3), 2),
    "GLUE, epoch 2": (GLUE, lambda: in_step(2), 1),
}
"""The cell, what kills it, and the step of its last checkpoint."""


def main() -> int:
    torch.set_num_threads(1)
    for name, (cell, kill, _) in PLACES.items():
        if not (child := os.fork()):
            kill()
            cell.run(Options(quick=True, trained=Path(sys.argv[1]) / name))
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            print(f"{name} came to its end", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

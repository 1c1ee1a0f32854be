"""What a run shows in the terminal: tables, the bar."""

from __future__ import annotations

import io
import sys

import pytest
from transformers.trainer_callback import TrainerState

from pissa.cli.outcome import loss_table
from pissa.cli.progress import LossBar
from pissa.cli.terminal import busy_with, format_table
from runs import Terminal


def test_what_takes_a_while_is_said_on_a_terminal_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for screen, said in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", screen)
        with busy_with("reading the model"):
            assert ("reading the model ..." in screen.getvalue()) is said
        assert screen.getvalue().split("\r")[-2:-1] in ([], [" " * len("          reading the model ...")])


def test_a_table_is_aligned() -> None:
    table = format_table(["method", "loss\n(nats)", "n"], [["LoRA", "1.0", "1,000"], ["PiSSA-long", "12.5", "7"]])
    assert table.split("\n") == [
        "              loss",
        "method      (nats)      n",
        "----------  ------  -----",
        "LoRA           1.0  1,000",
        "PiSSA-long    12.5      7",
    ]


def test_a_table_of_losses_has_a_row_for_each_evaluation() -> None:
    """Also of a resumed run, and of one that ends between two evaluations."""
    history = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    history += [{"step": 2, "eval_loss": 1.75}, {"step": 3, "loss": 0.5}, {"step": 3, "train_loss": 1.0}]
    assert loss_table(history).split("\n") == [
        "step  training loss  held-out loss",
        "----  -------------  -------------",
        "0                           3.0000",
        "2            1.5000         1.7500",
    ]
    history[0]["right"] = 3
    assert loss_table(history).split("\n")[1:] == [
        "----  -------------  -------------  -----",
        "0                           3.0000      3",
        "2            1.5000         1.7500",
    ]


def test_the_bar_of_a_training_fits_80_columns() -> None:
    """tqdm leaves the last one free."""
    shown, state = LossBar(), TrainerState(max_steps=240, is_world_process_zero=True)
    shown.on_train_begin(None, state, None)
    bar = shown.training_bar
    bar.dynamic_ncols, bar.ncols, bar.n, bar.start_t, bar._time = None, 79, 120, 0, lambda: 620
    state.log_history = [{"step": step, "loss": 1.5, "num_tokens": 700 * step, "seconds": 0.5} for step in (1, 2)]
    shown.on_log(None, state, None, {"eval_loss": 1.469})
    shown.on_log(None, state, None, {"loss": 1.463})
    text = str(bar)
    assert len(text) <= 79
    assert text.startswith("training: 120/240 |")
    assert text.endswith("| [10:20<10:20, 1,400 tokens/s, loss 1.463, held out 1.469]")
    bar.close()

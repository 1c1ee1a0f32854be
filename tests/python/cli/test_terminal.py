"""pissa.cli.terminal: tables."""

from __future__ import annotations

from pissa.cli.outcome import loss_table
from pissa.cli.terminal import format_table


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

"""What a training has given: an answer before and after, and the report."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch

import pissa
from pissa.adapters.peft_layout import inexact_lora
from pissa.cli.data import IGNORED
from pissa.cli.generation import generate
from pissa.cli.past_run import RUN_FILE
from pissa.cli.progress import tokens_per_second
from pissa.cli.run_folder import DATA_FILE
from pissa.cli.templates import end_of_answer
from pissa.cli.terminal import as_rows, as_size, format_table, print_row
from pissa.containers.checkpoint import Contents


def method_name(ours: Any, config: pissa.PissaConfig) -> str:
    """Such as "LoRA", "QPiSSA (nf4)", "PiSSA with DoRA"; of other initialisations, the value of `init`."""
    known = {"lora": "LoRA", "pissa": "PiSSA"}.get(config.init)
    name = known or config.init
    if ours.quant:
        name = f"{'Q' * bool(known)}{name} ({ours.quant})"
    more = " and ".join(word for word, used in (("DoRA", config.use_dora), ("rsLoRA", config.use_rslora)) if used)
    return f"{name} with {more}" if more else name


def answer(trainer: Any, tokenizer: Any) -> str | None:
    """The model's answer to the first held-out question; None if there is none, or if several processes train."""
    question = _question(trainer)
    if question is None:
        return None
    model, ends = trainer.model.eval(), end_of_answer(tokenizer)
    with torch.no_grad(), torch.random.fork_rng([]):
        found = generate(model, tokenizer, question[0], _ANSWER, ends, do_sample=False, max_time=_PATIENCE)
    return str(tokenizer.decode(found, skip_special_tokens=True))


_ANSWER, _PATIENCE, _LINES = 96, 30.0, 4
"""The most tokens of an answer that is shown, the most seconds that it takes, and the most lines."""


def _question(trainer: Any) -> tuple[list[int], list[int]] | None:
    """The tokens of the first held-out question, and those of its answer."""
    rows = trainer.eval_dataset
    if trainer.args.world_size > 1 or not isinstance(rows, datasets.Dataset) or "labels" not in rows.column_names:
        return None
    row = rows[0]
    start = sum(label == IGNORED for label in row["labels"])
    # A plain text has no question, at most a start token.
    return (row["input_ids"][:start], row["input_ids"][start:]) if start > 1 else None


def show_answers(trainer: Any, tokenizer: Any, before: str | None) -> None:
    """Prints a held-out question, its answer, and the model's answers before and after training."""
    question = _question(trainer)
    if question is None or before is None:
        return
    asked, expected = map(tokenizer.decode, question)
    texts = {"asked": asked, "expected": expected, "before": before, "after": answer(trainer, tokenizer)}
    for label, text in texts.items():
        print(as_rows(label, str(text), _LINES))


def loss_table(history: Sequence[Mapping[str, Any]]) -> str:
    """The losses at each evaluation: the mean over the training since the one before, and that of the held-out data."""
    rows, losses = [], list[float]()
    for row in history:
        if "loss" in row:
            losses.append(row["loss"])
        if "eval_loss" in row:
            trained = f"{statistics.mean(losses):.4f}" if losses else ""
            rows.append((str(row["step"]), trained, f"{row['eval_loss']:.4f}"))
            losses.clear()
    return format_table(("step", "training loss", "held-out loss"), rows)


def report(trainer: Any, ours: Any, config: pissa.PissaConfig, contents: Contents) -> dict[str, Any]:
    """Prints how the run went, and returns the report."""
    out, model, history = trainer.args.output_dir, ours.model_name_or_path, trainer.state.log_history
    steps = [row for row in history if "loss" in row]
    losses, held_out = [row["loss"] for row in steps], [row["eval_loss"] for row in history if "eval_loss" in row]
    if not steps:  # none was logged
        return {}
    seconds, memory = statistics.median(row["seconds"] for row in steps), steps[-1]["peak_memory_mib"]
    first, last = (statistics.mean(part) for part in (losses[:5], losses[-5:]))
    print_row("loss", f"{first:.4f} in the first 5 steps, {last:.4f} in the last 5")
    if held_out:
        print(f"\n{loss_table(history)}\n")
        print_row("held out", f"loss {held_out[0]:.4f} before, {held_out[-1]:.4f} after")
    speed = f", {rate:,.0f} tokens a second" if (rate := tokens_per_second(history)) else ""
    print_row("cost", f"{seconds:.2f} s per step (median){speed}, peak memory {as_size(int(memory * 2**20))}")
    print_row("saved", f"{out}: the adapter; {RUN_FILE}, {DATA_FILE} and checkpoints, which only --resume needs")
    if ours.quant:
        print_row("note", inexact_lora([ours.quant]))
    if contents is Contents.RESIDUAL:
        print_row("note", f"pissa.load({model!r}, adapter={out!r}) has it exactly")
    print_row("next", f"pissa chat {shlex.quote(out)}")
    print_row("", shlex.join(["pissa", "merge", out, "NEW_FOLDER", "--base", model]))
    costs = {"seconds_per_step": seconds, "peak_memory_mib": memory}
    return {"learning_rate": trainer.args.learning_rate, "losses": losses, "held_out": held_out, **costs}

"""What a training has given: its method, its losses and the report."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import pissa
from pissa.adapters.peft_layout import inexact_lora
from pissa.cli.answers import HeldOutAnswers
from pissa.cli.past_run import RUN_FILE
from pissa.cli.progress import tokens_per_second
from pissa.cli.run_folder import DATA_FILE
from pissa.cli.score import RIGHT
from pissa.cli.terminal import as_size, format_table, print_row
from pissa.containers.checkpoint import Contents
from pissa.system import shell


def method_name(ours: Any, config: pissa.PissaConfig) -> str:
    """Such as "LoRA", "QPiSSA (nf4)", "PiSSA with DoRA"; of other initialisations, the value of `init`."""
    known = {"lora": "LoRA", "pissa": "PiSSA"}.get(config.init)
    name = known or config.init
    if ours.quant:
        name = f"{'Q' * bool(known)}{name} ({ours.quant})"
    more = " and ".join(word for word, used in (("DoRA", config.use_dora), ("rsLoRA", config.use_rslora)) if used)
    return f"{name} with {more}" if more else name


def loss_table(history: Sequence[Mapping[str, Any]]) -> str:
    """The losses at each evaluation: the mean over the training since the one before, and that of the held-out data;
    beside them the number of right answers, if any were counted."""
    rows, losses = [], list[float]()
    header = ("step", "training loss", "held-out loss", "right")[: 4 if any("right" in row for row in history) else 3]
    for row in history:
        if "loss" in row:
            losses.append(row["loss"])
        if "eval_loss" in row:
            trained = f"{statistics.mean(losses):.4f}" if losses else ""
            cells = (str(row["step"]), trained, f"{row['eval_loss']:.4f}", str(row.get("right", "")))
            rows.append(cells[: len(header)])
            losses.clear()
    return format_table(header, rows)


def results(history: Sequence[Mapping[str, Any]], answers: HeldOutAnswers) -> Iterator[str]:
    """Yields sentences on how good a model was before training and is now."""
    if score := answers.score(history):
        yield f"Right answers: {answers.text(score)}. Right means {RIGHT}."
    if held_out := [row["eval_loss"] for row in history if "eval_loss" in row]:
        yield f"Held-out loss: {held_out[-1]:.4f}, {held_out[0]:.4f} before training."


def further(run: str, model: str, contents: Contents) -> dict[str, str]:
    """The commands after which other programs have the trained model, and what each gives."""
    file = shell("pissa", "export", run, f"{run.rstrip('/' + os.sep)}.gguf", "--to", "gguf-model")
    of_split = ["--base", model] if contents is Contents.RESIDUAL else []  # the adapter names what was split
    merge = shell("pissa", "merge", run, "NEW_FOLDER", *of_split)
    if contents is Contents.GGUF:
        return {file: "one file for Ollama, LM Studio and llama.cpp"}
    if contents is Contents.DENSE:
        return {file: "one file for Ollama, LM Studio and llama.cpp", merge: "a folder for transformers and vLLM"}
    return {merge: "a folder for transformers and vLLM"}


def _predict(run: str, ours: Any) -> str:
    """The command that answers a table like the one of the training."""
    kind = PurePath(ours.dataset_name).suffix or ".csv"
    command = ["pissa", "predict", run, "--data", f"NEW{kind}", "--out", f"ANSWERS{kind}"]
    if question := {"question", "prompt"} & set(ours.columns or ()):
        [name] = question
        command += ["--columns", f"{name}={ours.columns[name]}"]
    return shell(*command)


def report(
    trainer: Any, ours: Any, config: pissa.PissaConfig, contents: Contents, answers: HeldOutAnswers
) -> dict[str, Any]:
    """Prints how the run went, and returns the report."""
    out, model, history = trainer.args.output_dir, ours.model_name_or_path, trainer.state.log_history
    steps = [row for row in history if "loss" in row]
    losses, held_out = [row["loss"] for row in steps], [row["eval_loss"] for row in history if "eval_loss" in row]
    score = answers.score(history)
    if not steps:  # none was logged
        return {}
    seconds, memory = statistics.median(row["seconds"] for row in steps), steps[-1]["peak_memory_mib"]
    first, last = (statistics.mean(part) for part in (losses[:5], losses[-5:]))
    print_row("loss", f"{first:.4f} in the first 5 steps, {last:.4f} in the last 5")
    if held_out:
        print(f"\n{loss_table(history)}\n")
        if score:
            print_row("right", answers.text(score))
        print_row("held out", f"loss {held_out[0]:.4f} before, {held_out[-1]:.4f} after")
    speed = f", {rate:,.0f} tokens a second" if (rate := tokens_per_second(history)) else ""
    print_row("cost", f"{seconds:.2f} s per step (median){speed}, peak memory {as_size(int(memory * 2**20))}")
    print_row("saved", f"{out}: the adapter; {RUN_FILE}, {DATA_FILE} and checkpoints, which only --resume needs")
    if ours.quant:
        print_row("note", inexact_lora([ours.quant]))
    if contents is Contents.RESIDUAL:
        print_row("note", f"pissa.load({model!r}, adapter={out!r}) has it exactly")
    print_row("next", f"pissa chat {shell(out)}")
    if score:
        print_row("", f"{_predict(out, ours)}  # a table of new questions, answered")
    for command, what in further(out, model, contents).items():
        print_row("", f"{command}  # {what}")
    costs = {"seconds_per_step": seconds, "peak_memory_mib": memory}
    found = {"learning_rate": trainer.args.learning_rate, "losses": losses, "held_out": held_out, **costs}
    return found | ({"right": score} if score else {})

"""Generates docs/command-line.md from the parser: `python docs/command_line.py`. A test fails if the page is old."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import transformers
import trl

from pissa.cli import COMMANDS, parser_for
from pissa.cli.training_options import SHOWN

PAGE = Path(__file__).with_name("command-line.md")
TRAININGS = {"finetune": "SFTConfig", "dpo": "DPOConfig"}
OURS = "model, data and method"
"""The group of our own options, as pissa.cli.options names it."""

# What we say of options of transformers, TRL and PEFT. Those of their trainers that are not here are only named.
TEXTS = {
    "model_revision": "branch, tag or commit of a model on the Hub",
    "attn_implementation": "transformers' implementation of attention (default: sdpa)",
    "dataset_config": "configuration of a data set on the Hub",
    "dataset_train_split": "its split to train on",
    "dataset_test_split": "its split to evaluate on",
    "dataset_streaming": "read the data set while training",
    "exclude_modules": "layers not to adapt",
    "target_parameters": "experts to adapt, by the names of their parameters",
    "lora_dropout": "dropout of the adapter's input (default: 0)",
    "bias": "biases to train: none, all or lora_only (default: none)",
    "use_rslora": "scale by alpha / √r instead of alpha / r",
    "use_dora": "DoRA: train the lengths of a weight's rows separately",
    "modules_to_save": "modules to train as a whole",
    "layers_to_transform": "numbers of the blocks to adapt",
    "layers_pattern": "name of the list of blocks, for --layers-to-transform",
    "rank_pattern": "ranks of some layers, as JSON",
    "alpha_pattern": "alphas of some layers, as JSON",
    "trainable_token_indices": "tokens whose embeddings are trained, as JSON",
    "lr_scheduler_type": "schedule of the learning rate: cosine, linear, constant, ...",
    "warmup_steps": "steps in which the rate rises: their share or, from 1 on, their number",
    "bf16": "autocast to bfloat16",
    "gradient_checkpointing": "compute activations twice instead of keeping them "
    "(default: if they would fill more than half of the free memory)",
    "logging_steps": "steps between two reports",
    "report_to": "trackers that receive the losses: tensorboard, wandb, ...",
    "save_steps": "steps between two checkpoints",
    "save_total_limit": "number of checkpoints to keep",
    "use_cpu": "train on the CPU (default: unless pissa selftest --device cuda has passed)",
    "train_sampling_strategy": "order of the examples: random, sequential, group_by_length, batch_rebalance",
    "packing": "put several examples into one row",
    "padding_free": "put the examples of a batch into one row",
    "beta": "how strongly the policy is tied to the reference",
}
HEAD = f"""\
# Command line

`pissa COMMAND --help` prints the same and more, and `pissa --version` prints the version. Option names may contain `_`
in place of `-`. The exit status is 0 on success, 1 if a check failed, 2 if the input was wrong, and 130 if the command
was interrupted. `docs/command_line.py` makes this page from the parsers,
with TRL {trl.__version__} and transformers {transformers.__version__}.

```sh
pissa finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --out trained --epochs 2
```
"""


def page() -> str:
    parser = parser_for(COMMANDS)
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    parts, told = [HEAD], set[str]()
    for name, command in commands.items():
        parts.append(f"## pissa {name}\n\n{command.description}\n")
        rows = [row for action in command._actions if (row := _row(command, action))]
        if name == "dpo":
            parts.append("It takes the options of `pissa finetune`, and these:\n")
            rows = [row for row in rows if row not in told]
        if rows:
            parts.append("\n".join(["| option | what it does | default |", "|---|---|---|", *rows, ""]))
        if name in TRAININGS:
            others = [f"`{_names(action)[0]}`" for action in command._actions if _is_other(command, action)]
            parts.append(_wrapped(f"TRL's `{TRAININGS[name]}` describes further options:", set(others) - told))
            told |= {*rows, *others}
    return "\n".join(parts)


def _wrapped(text: str, names: Iterable[str]) -> str:
    return textwrap.fill(f"{text} {', '.join(sorted(names))}.", 120, break_on_hyphens=False) + "\n"


def _is_other(command: argparse.ArgumentParser, action: argparse.Action) -> bool:
    """Whether it is an option of TRL or of transformers' Trainer that is only named."""
    ours = _group_of_ours(command)
    return bool(ours) and action not in ours and action.dest not in (*TEXTS, *SHOWN, "help")


def _group_of_ours(command: argparse.ArgumentParser) -> list[argparse.Action]:
    """Empty for a command that does not take TRL's options."""
    return next((group._group_actions for group in command._action_groups if group.title == OURS), [])


def _row(command: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    """The line of a table, if the option has one. The opposite of a switch stands beside it."""
    if action.dest == "help" or _is_opposite(action) or _is_other(command, action):
        return None
    text, default = action.help or "", f"`{action.default}`"
    if _group_of_ours(command):
        text = TEXTS.get(action.dest, text)
    if action.default in (None, False, 0, "", argparse.SUPPRESS):
        default = ""
    if written := re.search(r" \(default: ([^)]*)\)", text):
        text, default = text.replace(written[0], ""), "" if written[1] in ("None", "False") else written[1]
    if action.choices and not any(str(choice) in text for choice in action.choices):
        text += ": " + ", ".join(f"`{choice}`" for choice in action.choices)
    if re.match(r"[A-Z][a-z]+\b", text):
        text = text[0].lower() + text[1:]
    opposites = [other for other in command._actions if other.dest == action.dest and _is_opposite(other)]
    names = [f"`{name}`" for one in (action, *opposites) for name in _names(one)]
    return f"| {', '.join(names)} | {text} | {default} |".replace("  |", " |")


def _is_opposite(action: argparse.Action) -> bool:
    return f"--no_{action.dest}" in action.option_strings


def _names(action: argparse.Action) -> list[str]:
    """The spellings with hyphens, the shortest first. Of an argument without a name, what its help calls it."""
    if not action.option_strings:
        return [str(action.metavar or action.dest)]
    return sorted((name for name in action.option_strings if "_" not in name), key=lambda name: (len(name), name))


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

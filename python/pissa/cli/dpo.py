"""`pissa dpo`: trains a model on preferences, with TRL's DPOTrainer. The reference is the model without its adapter."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from pissa.cli.data import prompt_and_answer, read_preferences

if TYPE_CHECKING:
    from pissa.cli.checks import Step0

TRAINER = "DPO"


def run(args: argparse.Namespace) -> int:
    """Runs one training. Returns the exit code."""
    from pissa.cli import training

    return training.run(args, TRAINER, _rows, _check)


def _rows(source: str, seed: int, tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], str]:
    """Messages, as TRL takes them; texts with the Alpaca prompt, to which TRL adds the start token, for a tokenizer
    without a chat template."""
    rows = []
    for chosen, rejected in read_preferences(source):
        prompt: Any = chosen.messages[:-1]
        answers: list[Any] = [chosen.messages[-1:], rejected.messages[-1:]]
        if tokenizer.chat_template is None:
            (prompt, answers[0]), (_, answers[1]) = (prompt_and_answer(chat, tokenizer) for chat in (chosen, rejected))
            prompt = prompt.removeprefix(tokenizer.bos_token or "")
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return rows, ""


def _check(trainer: Any, found: Step0) -> tuple[str, bool]:
    """The first loss is ln 2: the margin between answers is 0.

    The log-probability of a token is off by at most twice the largest difference of its logits; the sum over T tokens
    by 2 sqrt(T) times the norm of all differences. The loss moves by beta / 2 times that.
    """
    if "ref" in trainer.model.peft_config:  # TRL's copy of the adapter, which computes what the base does
        trainer.model.delete_adapter("ref")
    args, data = trainer.args, trainer.train_dataset
    if args.loss_type != ["sigmoid"] or args.label_smoothing or not hasattr(data, "select"):
        return "", True
    first = data.select(range(min(args.per_device_train_batch_size, len(data))))
    loss = trainer.evaluate(first, metric_key_prefix="start")["start_loss"]
    bound = args.beta * math.sqrt(found.tokens) * found.bound * found.norm
    return f"; first loss {loss:.6f}, ln 2 = {math.log(2):.6f} (bound {bound:.1e})", abs(loss - math.log(2)) <= bound

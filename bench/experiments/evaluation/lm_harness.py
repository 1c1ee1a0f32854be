"""Benchmarks whose answers are generated, by lm-eval: grade-school and competition mathematics, exact short answers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.experiments.evaluation.competition_math import read_math
from pissa.cli.data import Chat, read_chats
from pissa.cli.encode import prompt_and_answer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_FOLDER = Path(__file__).parent / "tasks"


def _gsm8k(folder: Path) -> list[Chat]:
    return read_chats(str(folder / "test.jsonl"), 0)


def _problems(file: Path) -> list[Chat]:
    return read_chats(str(file), 0)


TASKS: dict[str, Callable[[Path], list[Chat]]] = {"gsm8k": _gsm8k, "problems": _problems, "math": read_math}
"""What reads the data of each task. A chat ends with the expected answer."""


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    data: Path,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
) -> dict[str, float]:
    """Lets the model answer the problems of a task greedily, without examples, and scores the answers.

    A prompt is the one that `pissa finetune` trains with: the tokenizer's chat template, or the Alpaca prompt if it has
    none. Nothing is downloaded or kept on disk; torch's generator stays as it is. lm-eval shows a bar on stderr, unless
    the environment variable TQDM_DISABLE is set.

    Args:
        model: a causal language model of transformers, with an adapter or without. It is evaluated as it is, on its
            device, and is afterwards in training or evaluation mode as before.
        tokenizer: has an end-of-text token, and is not changed.
        task: "gsm8k", "problems" or "math".
        data: for gsm8k a folder with test.jsonl, each line with "question" and "answer", which ends with "#### " and
            the number; for problems such a file, with short answers of one line; for math see `read_math`.
        limit: the first so many problems only.
        batch_size: problems that are answered together.
        max_new_tokens: length of an answer; by default the task's (512, 48, 1024).

    Returns:
        Shares of right answers: "strict-match" (the number after "####") and "flexible-extract" (the last number) for
        gsm8k, "exact_match" for problems, "math_verify" for math.

    Raises:
        ValueError: an unknown task, or a limit or length below 1.
        pissa.cli.terminal.UserError: the data cannot be read.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed: {', '.join(TASKS)}")
    for name, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more, or None")
    chats = TASKS[task](data)[:limit]
    documents = [
        {"prompt": prompt_and_answer(chat, tokenizer)[0], "answer": chat.messages[-1]["content"]} for chat in chats
    ]
    generation: dict[str, Any] = {"eos_token_id": _ends(chats[0], tokenizer)}
    if max_new_tokens is not None:
        generation["max_gen_toks"] = max_new_tokens
    return _scores(_run(model, tokenizer, task, documents, generation, batch_size))


def _ends(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: that of texts, and that of a turn, which training puts behind an answer."""
    last = tokenizer(prompt_and_answer(chat, tokenizer)[1], add_special_tokens=False).input_ids[-1]
    return sorted({tokenizer.eos_token_id, *({last} & set(tokenizer.all_special_ids))})


def _run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    documents: list[dict[str, str]],
    generation: dict[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """What lm-eval measures, under its names."""
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        # Not lm_eval.simple_evaluate, which seeds all generators, and asks git and pip about the machine.
        manager = TaskManager(include_path=str(_FOLDER), include_defaults=False, metadata={"documents": documents})
        loaded = manager.load([task])
        loaded["tasks"][task].set_config("generation_kwargs", generation, update=True)
        training = model.training
        try:
            # A copy, for lm-eval gives a tokenizer without a padding token one. Prompts have their special tokens.
            lm = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, add_bos_token=False)
            found = lm_eval.evaluate(lm, loaded, bootstrap_iters=0, log_samples=False)
        finally:
            model.train(training)
    measured: dict[str, Any] = found["results"][task]
    return measured


def _scores(measured: dict[str, Any]) -> dict[str, float]:
    """lm-eval names a score "metric,filter": the filter's name where it has one, else the metric's."""
    scores = {}
    for name, value in measured.items():
        metric, _, chosen = name.partition(",")
        if chosen and not metric.endswith("_stderr"):
            scores[metric if chosen == "none" else chosen] = float(value)
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings, which tell a user of its command line what we do on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

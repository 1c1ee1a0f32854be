"""What a language model learns here: data of a task, in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
from transformers import AutoTokenizer

from bench.compare.weights import smollm2
from bench.experiments.experiment import Options
from bench.training.tasks import PLAIN_TEMPLATE
from pissa.cli.data import Chat, read_chats
from pissa.cli.encode import encode
from pissa.cli.sources import GSM_SYMBOLIC, find_package

Row = dict[str, list[int]]


class LanguageTask(NamedTuple):
    """Rows have input_ids and labels; labels are -100 but for the tokens of answers."""

    folder: Path
    """Of the model and its tokenizer."""
    tokenizer: Any
    steps: int
    batch: int
    train: list[Row]
    held_out: list[Row]
    unrelated: list[Row]
    """Text that has nothing to do with the task; labels are all tokens."""
    exact: bool
    """Whether an answer is right only as it stands, to the last token."""


class _Size(NamedTuple):
    steps: int
    batch: int
    longest: int
    """Tokens; only examples that need no cut are used."""
    held_out: int
    prose: tuple[int, int] = (12, 96)
    """Rows, and tokens in each."""


_SIZES = {"gsm8k": _Size(40, 2, 104, 40), "sums": _Size(48, 8, 64, 200)}
_QUICK = _Size(2, 1, 256, 2, (2, 8))


def load_task(name: str, options: Options) -> LanguageTask:
    """
    Raises:
        SystemExit: a model or data that are needed are not there.
    """
    folder = Path(options.model) if options.model else smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # SmolLM2's own puts a system message of 20 tokens before every chat.
    tokenizer.chat_template = PLAIN_TEMPLATE
    size = _SIZES[name]
    if options.quick:
        size = _QUICK
        chats = read_chats(GSM_SYMBOLIC, 0)[:80] if name == "gsm8k" else _sums(40)[0][:80]
        train, test = chats[40:], chats[:40]
    else:
        train, test = _gsm8k(options.path("gsm8k")) if name == "gsm8k" else _sums(size.held_out)
    rows = {part: _rows(chats, tokenizer, size.longest) for part, chats in (("train", train), ("test", test))}
    held_out = sorted(rows["test"][: size.held_out], key=lambda row: len(row["input_ids"]))
    prose = _prose(tokenizer, *size.prose)
    return LanguageTask(folder, tokenizer, size.steps, size.batch, rows["train"], held_out, prose, name != "gsm8k")


def _gsm8k(folder: Path) -> tuple[list[Chat], list[Chat]]:
    """Grade-school problems with worked answers (openai/grade-school-math, MIT): train.jsonl and test.jsonl."""
    train, test = (read_chats(str(folder / f"{part}.jsonl"), 0) for part in ("train", "test"))
    return train, test


def _sums(held_out: int) -> tuple[list[Chat], list[Chat]]:
    """Sums and differences of two numbers of one or two digits, out of reasoning-gym: a short exact answer."""
    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    made = reasoning_gym.create_dataset(
        "basic_arithmetic", seed=1, size=4000, operators=["+", "-"], allow_parentheses=False, **sizes
    )
    answers = {entry["question"]: entry["answer"] for entry in made}  # each question once
    chats = [
        Chat("basic_arithmetic", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        for question, answer in answers.items()
    ]
    return chats[held_out:], chats[:held_out]


def _rows(chats: list[Chat], tokenizer: Any, longest: int) -> list[Row]:
    found, _, _ = encode(chats, tokenizer, longest + 1)
    return [row for row in found if len(row["input_ids"]) <= longest]


def _prose(tokenizer: Any, count: int, length: int) -> list[Row]:
    """The beginning of a story of 1889 that reasoning-gym carries: "In the Year 2889", by Jules and Michel Verne."""
    package = find_package("reasoning_gym")
    if package is None:
        raise SystemExit("needs the package reasoning-gym, which is not installed: pip install reasoning-gym")
    book = (package / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    text = book.partition("*** START OF")[2].partition("***")[2].strip()
    tokens = tokenizer(text, add_special_tokens=False).input_ids[: count * length]
    return [{"input_ids": row, "labels": row} for i in range(count) if (row := tokens[i * length : (i + 1) * length])]

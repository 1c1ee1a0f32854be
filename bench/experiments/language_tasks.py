"""The tasks of the language model: their data, in tokens."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
from transformers import AutoTokenizer

from bench.compare.weights import smollm2, unpacked
from bench.experiments.experiment import Options
from bench.packages import required_package, unpack
from pissa.cli.data import encode, read_chats
from pissa.cli.sources import records
from pissa.cli.templates import Chat

Row = dict[str, list[int]]

# SmolLM2's own, without the system message of 20 tokens that it would put before every chat.
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# For a model that knows no chats: lines, behind the start token.
BARE_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


class LanguageTask(NamedTuple):
    """Rows have input_ids and labels. Labels are -100 except for the tokens of answers."""

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
    longer: list[Row]
    """Training examples that are too long for the training, which calibrations read."""
    prose: list[Row]
    """The text behind `unrelated`."""
    file: Path | None = None
    """The GGUF file that the model was decoded from, where it has codes of its own."""

    def texts(self, what: str, examples: int) -> list[Row]:
        """What a base is calibrated on: the first training examples ("task"), and longer ones when there are too few;
        so many rows of prose; or half of each ("half")."""
        problems = [*self.train, *self.longer]
        half = examples // 2
        return {
            "task": problems[:examples],
            "prose": self.prose[:examples],
            "half": problems[:half] + self.prose[:half],
        }[what]


class _Size(NamedTuple):
    steps: int
    batch: int
    longest: int
    """Tokens; only examples that need no cut are used."""
    held_out: int
    prose: tuple[int, int] = (12, 96)
    """Rows that are measured, and tokens in each."""
    file: str = ""
    """The name of the model's GGUF file among the data; SmolLM2 if it is empty."""


_SIZES = {
    "gsm8k": _Size(40, 2, 104, 40),
    "gsm8k_250": _Size(250, 2, 120, 40),
    "gsm8k_24": _Size(24, 2, 96, 24),
    "sentences": _Size(24, 4, 44, 48),
    "sums": _Size(48, 8, 64, 200),
    "gemma_gsm8k": _Size(40, 2, 96, 40, file="gemma"),
    "gemma_sums": _Size(48, 8, 64, 200, file="gemma"),
}
_QUICK = _Size(2, 1, 256, 2, (2, 8))
_READ = 256
"""Tokens of the longest example of a calibration."""
_PROSE = 64
"""Rows of prose for calibrations."""


def load_task(name: str, options: Options) -> LanguageTask:
    """
    Raises:
        SystemExit: a model or data that are needed are not there.
    """
    size = _SIZES[name]
    file = options.path(size.file) if size.file and not options.quick else None
    ours = unpacked(size.file, partial(unpack, file)) if file else smollm2()
    folder = Path(options.model) if options.model else ours
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = BARE_TEMPLATE if file else PLAIN_TEMPLATE
    exact = name.endswith("sums")
    if name == "sentences":
        train, test = _sentences()
    elif exact or options.quick:  # which are short: a vocabulary of 49,152 makes a tiny model's tokens dear
        train, test = _sums(size.held_out)
    else:
        train, test = _gsm8k(options.path("gsm8k"))
    if options.quick:
        size, train, test = _QUICK, train[40:80], test[:40]
    rows = _rows(train, tokenizer, max(size.longest, _READ))
    short = [row for row in rows if len(row["input_ids"]) <= size.longest]
    longer = [row for row in rows if len(row["input_ids"]) > size.longest]
    held_out = _rows(test, tokenizer, size.longest)[: size.held_out]
    held_out.sort(key=lambda row: len(row["input_ids"]))
    count, length = size.prose
    prose = _prose(tokenizer, count + _PROSE, length)
    return LanguageTask(
        *(folder, tokenizer, size.steps, size.batch, short, held_out, prose[:count], exact, longer, prose[count:]),
        file,
    )


def problems(folder: Path, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Problems of GSM8K for training, and 40 held out, of at most 128 tokens of another model."""
    train, test = (_rows(chats, tokenizer, 128) for chats in _gsm8k(folder))
    return train, test[:40]


def _gsm8k(folder: Path) -> tuple[list[Chat], list[Chat]]:
    """Grade-school problems with worked answers (openai/grade-school-math, MIT): train.jsonl and test.jsonl."""
    train, test = (read_chats(records(str(folder / f"{part}.jsonl"))) for part in ("train", "test"))
    return train, test


def _sums(held_out: int) -> tuple[list[Chat], list[Chat]]:
    """Sums and differences of two numbers of one or two digits, from reasoning-gym: a short exact answer."""
    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    made = reasoning_gym.create_dataset(
        "basic_arithmetic", seed=1, size=4000, operators=["+", "-"], allow_parentheses=False, **sizes
    )
    answers = {entry["question"]: entry["answer"] for entry in made}  # each question once
    chats = _chats(((answer, question) for question, answer in answers.items()), "basic_arithmetic")
    return chats[held_out:], chats[:held_out]


def _sentences() -> tuple[list[Chat], list[Chat]]:
    """The words of a sentence put into order, from reasoning-gym: prose, no arithmetic, short answers."""
    made = reasoning_gym.create_dataset("sentence_reordering", seed=1, size=1000)
    chats = _chats({entry["answer"]: entry["question"] for entry in made}.items(), "sentence_reordering")
    return chats[100:], chats[:100]


def _chats(pairs: Iterable[tuple[str, str]], where: str) -> list[Chat]:
    """Chats of questions and their answers."""
    roles = ("user", "assistant")
    return [
        Chat(where, [{"role": role, "content": text} for role, text in zip(roles, (question, answer), strict=True)])
        for answer, question in pairs
    ]


def _rows(chats: list[Chat], tokenizer: Any, longest: int) -> list[Row]:
    found, _, _ = encode(chats, tokenizer, longest + 1)
    return [row for row in found if len(row["input_ids"]) <= longest]


def _prose(tokenizer: Any, count: int, length: int) -> list[Row]:
    """The beginning of a story of 1889 that reasoning-gym carries: "In the Year 2889", by Jules and Michel Verne."""
    package = required_package("reasoning_gym", "reasoning-gym")
    book = (package / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    text = book.partition("*** START OF")[2].partition("***")[2].strip()
    tokens = tokenizer(text, add_special_tokens=False).input_ids[: count * length]
    starts = range(0, len(tokens), length)
    rows = [tokenizer("").input_ids + tokens[start : start + length] for start in starts]  # of Gemma's, "" has a token
    return [{"input_ids": row, "labels": row} for row in rows]

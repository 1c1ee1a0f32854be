"""Instructions with responses, as the paper trains with: MetaMathQA, CodeFeedback, WizardLM's Evol-Instruct."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa.cli.encode import ALPACA

if TYPE_CHECKING:
    from datasets import Dataset

Pair = tuple[str, str]

_ROLES = ("human", "gpt")
"""Who speaks first and second in WizardLM's conversations."""


def _query_and(answer: str) -> Callable[[dict[str, Any]], Pair]:
    return lambda row: (row["query"], row[answer])


def _first_turn(row: dict[str, Any]) -> Pair:
    asked, answered = row["conversations"][:2]
    if (asked["from"], answered["from"]) != _ROLES:
        raise ValueError(f"a conversation begins with {asked['from']}, {answered['from']}; needed: {', '.join(_ROLES)}")
    return asked["value"], answered["value"]


FORMATS: dict[str, tuple[str, Callable[[dict[str, Any]], Pair]]] = {
    "metamath": ("query response", _query_and("response")),
    "codefeedback": ("query answer", _query_and("answer")),
    "evol-instruct": ("conversations", _first_turn),
}
"""The columns that each format has, and what makes an instruction and its response of a row.

On the hub: meta-math/MetaMathQA (query, response, type, original_question), m-a-p/CodeFeedback-Filtered-Instruction
(query, answer, resource, lang), WizardLMTeam/WizardLM_evol_instruct_V2_196k (idx; conversations of one turn).
"""


def load(form: str, source: str, rows: int | None = None, cache: Path | None = None) -> Dataset:
    """Reads training data for TRL's SFTTrainer, which then has the loss on responses only.

    The prompt is Stanford Alpaca's without an input, as in the training script of the paper's authors, who put a line
    break behind a response. The trainer adds the end-of-text token, and what a tokenizer starts texts with.

    Args:
        form: a name in FORMATS.
        source: a JSON file with a list of objects, a JSONL file, a folder of such files, or the name of a data set of
            the Hugging Face hub.
        rows: the first so many only; all if there are fewer.
        cache: where `datasets` keeps its copy; by default where it keeps all.

    Returns:
        Columns "prompt" and "completion", texts both.

    Raises:
        ValueError: an unknown format, a number of rows below 1, other columns than the format's.
    """
    if form not in FORMATS:
        raise ValueError(f"format is {form!r}; allowed: {', '.join(FORMATS)}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}; allowed: 1 or more, or None")
    columns, pair = FORMATS[form]
    data = _read(source, cache)
    missing = set(columns.split()) - set(data.column_names)
    if missing:
        raise ValueError(f"{source} has no {', '.join(sorted(missing))}, which {form} has; found {data.column_names}")
    if rows is not None:
        data = data.take(min(rows, len(data)))

    def example(row: dict[str, Any]) -> dict[str, str]:
        instruction, response = pair(row)
        return {"prompt": ALPACA.format(instruction=instruction), "completion": f"{response}\n"}

    return data.map(example, remove_columns=data.column_names)


def _read(source: str, cache: Path | None) -> Dataset:
    from datasets import load_dataset

    folder = None if cache is None else str(cache)
    if Path(source).is_file():
        return load_dataset("json", data_files=source, split="train", cache_dir=folder)
    return load_dataset(source, split="train", cache_dir=folder)

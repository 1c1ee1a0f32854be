"""Rows that repeat others are on one side of the held-out cut."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from pissa.cli.data import IGNORED
from pissa.cli.repeats import distinct, divide


def encoded(pairs: list[tuple[int, int]]) -> Dataset:
    """Rows of questions and answers of one number each; of plain texts, where the question is 0."""
    start = 9
    rows = [
        {"input_ids": [start, asked, answer], "labels": [IGNORED, IGNORED if asked else 0, answer]}
        for asked, answer in pairs
    ]
    return Dataset.from_list(rows)


KINDS = {
    "encoded": encoded([(i + 1, 0) for i in range(100)]),
    "texts, too": encoded([(i % 2 * i, i) for i in range(100)]),
    "preferences": Dataset.from_list([{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(100)]),
    "others": Dataset.from_list([{"image": 1}] * 100),
}


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_rows_without_repeats_are_divided_as_ever(rows: Dataset) -> None:
    """A run of an earlier version can go on: the same rows, in the same order."""
    for count, seed in ((8, 0), (37, 0), (8, 1)):
        parts = rows.add_column("place", [*range(100)]).train_test_split(test_size=count, seed=seed)
        assert divide(rows, count, seed) == (parts["train"]["place"], parts["test"]["place"])


@pytest.mark.parametrize("seed", range(5))
def test_a_question_is_on_one_side(seed: int) -> None:
    pairs = [(i % 20 + 1, i) for i in range(60)] + [(i, 0) for i in range(100, 140)]  # the first three times each
    train, held_out = divide(encoded(pairs), 10, seed)
    assert sorted(train + held_out) == list(range(100))
    assert not {pairs[i][0] for i in train} & {pairs[i][0] for i in held_out}
    assert len(held_out) == 10
    assert divide(encoded(pairs), 10, seed) == (train, held_out)


def test_a_prompt_of_preferences_and_a_text_are_on_one_side() -> None:
    preferences: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": f"{i // 2}"}], "chosen": f"{i}", "rejected": "no"} for i in range(40)
    ]
    for rows in (Dataset.from_list(preferences), encoded([(0, i // 2) for i in range(40)])):
        train, held_out = divide(rows, 9, 0)
        assert len(held_out) == 8  # whole pairs only
        assert not {i // 2 for i in train} & {i // 2 for i in held_out}


def test_answers_to_one_instruction_are_held_out() -> None:
    """All rows have the same question, and each answer occurs twice."""
    pairs = [(1, i // 2) for i in range(40)]
    train, held_out = divide(encoded(pairs), 8, 0)
    assert len(held_out) == 8
    assert not {pairs[i] for i in train} & {pairs[i] for i in held_out}
    assert divide(encoded([(1, 1)] * 40), 8, 0)[1] == []


def test_distinct_rows_are_counted() -> None:
    assert distinct(encoded([(1, 2), (1, 3), (1, 2), (2, 2)])) == 3

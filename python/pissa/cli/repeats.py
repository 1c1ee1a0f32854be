"""Rows that repeat others: how many differ, and which to hold out, so that none is tested on what it has trained on."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset

from pissa.cli.data import question_of


def distinct(rows: Iterable[Mapping[str, Any]]) -> int:
    """The number of rows without repeats."""
    return len({hash(str(row)) for row in rows})


def divide(rows: Dataset, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Chooses the rows to hold out, at random: `count`, or somewhat fewer if rows repeat others.

    Rows with the same question are on the same side, because the answer to one that is trained on may be remembered.
    If each question has more rows than are to be held out, as an instruction with many answers has, those with the same
    answer, too, are on the same side.

    Returns:
        The places of the rows to train on, in random order, and of those to hold out.
    """
    for names in _identities(rows):
        groups: dict[Hashable, list[int]] = {}
        for place, name in enumerate(names):
            groups.setdefault(name, []).append(place)
        trained, held_out = list[int](), list[int]()
        # In the order of its train_test_split, which keeps no rows together.
        for places in Dataset.from_dict({"places": [*groups.values()]}).shuffle(seed=seed)["places"]:
            (held_out if len(held_out) + len(places) <= count else trained).extend(places)
        if held_out:
            break
    return trained, held_out


def _identities(rows: Dataset) -> Iterator[Iterable[Hashable]]:
    """What rows with the same question have in common, and what those with the same answer to it have. Rows that are
    neither as `encode` returns them, nor preferences, are all different."""
    names = {*rows.column_names}
    if {"input_ids", "labels"} <= names:
        yield (hash(tuple(question_of(row) or row["input_ids"])) for row in rows)
        yield (hash(tuple(row["input_ids"])) for row in rows)
    elif names == {"prompt", "chosen", "rejected"}:
        yield map(json.dumps, rows["prompt"])
        yield map(json.dumps, rows)
    else:
        yield range(len(rows))

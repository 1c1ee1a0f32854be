"""A model's answers to held-out questions before, while and after it is trained: how many are right, where they are
short, and one to read."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from pissa.cli.data import question_of
from pissa.cli.generation import generate_many
from pissa.cli.score import RIGHT, are_short, is_right, most_frequent
from pissa.cli.templates import end_of_answer
from pissa.cli.terminal import as_rows, busy_with, print_row

_ASKED, _MORE = 200, 8
"""The most questions whose answers are counted, and the tokens that an answer may have more than the longest expected
one."""

_SHARE = 0.1
"""The most that the counts between the first and the last may take, as a share of the training's time."""

_BEGUN, _TOGETHER = 3, 1 / 3
"""The tokens of an answer, after the first, by which the time is measured, and the share of its time alone that one of
many takes: SmolLM2-135M gives 1.4 answers a second one by one, and 4.2 in batches."""

_ANSWER, _PATIENCE, _LINES = 96, 30.0, 4
"""The most tokens of a long answer, the most seconds that it takes, and the most lines of it that are shown."""


class HeldOutAnswers(TrainerCallback):  # type: ignore[misc]
    """Asks a model held-out questions. If all answers to them are short, it counts how many are right, and notes the
    number as `right` with the losses of an evaluation, in trainer_state.json. If not, it asks the first one alone.

    Args:
        model: a PeftModel.
        tokenizer: the one that has encoded the rows.
        rows: the held-out data. Those that are not encoded by `encode`, and plain texts, have no questions.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: Any) -> None:
        self.model, self.tokenizer, pairs = model, tokenizer, _questions(rows)
        self.expected = [self._text(answer) for _, answer in pairs]
        self.counted = bool(pairs) and are_short(self.expected)
        self.pairs = pairs if self.counted else pairs[:1]
        self.before, self.after = list[str](), list[str]()
        self.most = _MORE + max(len(answer) for _, answer in pairs) if self.counted else _ANSWER
        self.seconds, self.each = 0.0, False

    def ask_before(self) -> None:
        """Asks the untrained model, and says how many of its answers are right."""
        if not self.pairs:
            return
        with busy_with("asking the untrained model"):
            self.before = self._ask(self.pairs, self.most)
        if self.counted:
            found = f"{self._right(self.before)} of {len(self.pairs)} held out before training"
            print_row("answers", f"short, so the right ones are counted: {found}")
            print_row("", f"right: {RIGHT}")

    def measure(self) -> None:
        """Finds how long all answers take, at most, by the first tokens of one."""
        if not self.pairs:
            return
        clock = [time.perf_counter()]
        for tokens in (1, 1 + _BEGUN):
            self._ask(self.pairs[:1], tokens)
            clock.append(time.perf_counter())
        first, begun = (after - before for before, after in pairwise(clock))
        one = first + (self.most - 1) * (begun - first) / _BEGUN
        self.seconds = max(one, one * len(self.pairs) * _TOGETHER) if self.counted else min(one, _PATIENCE)

    def time_needed(self, training: float, evaluations: float) -> float:
        """The seconds that all answers will take, in a training of so many seconds with so many evaluations. Answers
        are also counted between the first and the last of these, if that takes little of its time."""
        between = self.seconds * max(evaluations - 2, 0)
        self.each = self.counted and between < _SHARE * training
        return 2 * self.seconds + self.each * between

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_last = state.global_step >= state.max_steps
        if not self.counted or not (state.global_step == 0 or is_last or self.each):
            return
        if state.global_step:
            self.after = self._ask(self.pairs, self.most)
        state.log_history[-1]["right"] = self._right(self.after or self.before)

    def show(self) -> None:
        """Prints a question, its answer, and the model's answers before and after training."""
        if not self.pairs:
            return
        asked = self.tokenizer.decode(self.pairs[0][0])
        expected = self.tokenizer.decode(self.pairs[0][1])
        after = self.after[0] if self.after else self._ask(self.pairs, self.most)[0]
        for label, text in {"asked": asked, "expected": expected, "before": self.before[0], "after": after}.items():
            print(as_rows(label, text, _LINES))

    def score(self, history: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """How many answers are right `before` and `after` training, `of` how many, and how many would be if all were
        the most frequent one; empty if they are not counted."""
        counts = [row["right"] for row in history if "right" in row]
        if not self.counted or not counts:
            return {}
        before, (_, frequent) = self._right(self.before), most_frequent(self.expected)
        return {"before": before, "after": counts[-1], "of": len(self.pairs), "most_frequent": frequent}

    def text(self, score: Mapping[str, int]) -> str:
        """A score in one line."""
        answer, count = most_frequent(self.expected)
        always = f"; always {answer!r} would be right for {count}" if count > 1 else ""
        return f"{score['after']} of {score['of']} held out, {score['before']} before training{always}"

    def _ask(self, pairs: Sequence[tuple[list[int], list[int]]], most: int) -> list[str]:
        """The answers of the model as it is now, of at most so many tokens, the likeliest token at each place."""
        self.model.eval()
        options = {} if self.counted else {"max_time": _PATIENCE}
        questions, ends = [question for question, _ in pairs], end_of_answer(self.tokenizer)
        with torch.no_grad():
            found = list(generate_many(self.model, self.tokenizer, questions, most, ends, **options))
        return [self._text(tokens) for tokens in found]

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _right(self, answers: Sequence[str]) -> int:
        return sum(map(is_right, answers, self.expected))


def _questions(rows: Any) -> list[tuple[list[int], list[int]]]:
    """The tokens of held-out questions, from all over the data, and those of their answers."""
    if not isinstance(rows, datasets.Dataset) or "labels" not in rows.column_names:
        return []
    count = min(len(rows), _ASKED)
    pairs = []
    for row in rows.select([place * len(rows) // count for place in range(count)]):
        if question := question_of(row):
            pairs.append((question, row["input_ids"][len(question) :]))
    return pairs

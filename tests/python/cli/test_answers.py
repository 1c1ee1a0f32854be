"""Held-out answers of a model while it is trained: which are counted, and when. A list stands in place of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from pissa.cli import answers
from pissa.cli.answers import HeldOutAnswers
from pissa.cli.data import encode
from pissa.cli.templates import Chat
from tiny_model import tiny_tokenizer


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> Callable[..., HeldOutAnswers]:
    """Makes the answers to these questions of a model that says what `model.says` returns for a question. Questions
    that it is asked are in `model.asked`, with the most tokens of an answer."""
    tokenizer = tiny_tokenizer()

    def generate_many(
        model: Any, _: Any, prompts: list[list[int]], most: int, *args: Any, **options: Any
    ) -> Iterator[list[int]]:
        for prompt in prompts:
            question = tokenizer.decode(prompt).partition("Instruction:\n")[2].partition("\n")[0]
            model.asked.append((question, most))
            yield list(tokenizer(model.says(question)).input_ids)

    def make(pairs: dict[str, str]) -> HeldOutAnswers:
        turns = [
            [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
            for asked, text in pairs.items()
        ]
        rows, _, _ = encode([Chat("", messages) for messages in turns], tokenizer, 1000)
        model = SimpleNamespace(asked=[], says=lambda _: "what?", eval=lambda: None)
        return HeldOutAnswers(model, tokenizer, Dataset.from_list(rows))

    monkeypatch.setattr(answers, "generate_many", generate_many)
    return make


MAILS = {"late": "delivery", "lost": "Delivery.", "money": "refund", "smashed": "repair"}


def evaluated(found: HeldOutAnswers, step: int, steps: int = 4) -> dict[str, Any]:
    """The row of the history that is written at a step."""
    row: dict[str, Any] = {"step": step, "eval_loss": 1.0}
    found.on_evaluate(None, SimpleNamespace(global_step=step, max_steps=steps, log_history=[row]), None)
    return row


def test_short_answers_are_counted_before_while_and_after(
    held_out: Callable[..., HeldOutAnswers], capsys: pytest.CaptureFixture[str]
) -> None:
    found = held_out(MAILS)
    found.model.says = lambda question: "Delivery!" if question == "late" else "a question"
    found.ask_before()
    said = capsys.readouterr().out
    assert "answers   short, so the right ones are counted: 1 of 4 held out before training\n" in said
    assert "right: equal to the expected answer apart from case" in said
    assert found.model.asked == [(mail, len("Delivery.") + 1 + 8) for mail in MAILS]  # and the end's token
    found.model.says = dict(MAILS, smashed="refund").__getitem__
    assert evaluated(found, 0)["right"] == 1  # of the untrained model, which has been asked
    found.each = True
    history = [evaluated(found, step) for step in (2, 4)]
    assert [row["right"] for row in history] == [3, 3]
    found.each = False
    assert "right" not in evaluated(found, 2)
    assert evaluated(found, 4)["right"] == 3
    score = found.score(history)
    assert score == {"before": 1, "after": 3, "of": 4, "most_frequent": 2}
    assert found.text(score) == "3 of 4 held out, 1 before training; always 'delivery' would be right for 2"
    found.show()
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3:] == ["expected  delivery</s>", "before    Delivery!", "after     delivery"]


def test_of_long_answers_one_is_shown(
    held_out: Callable[..., HeldOutAnswers], capsys: pytest.CaptureFixture[str]
) -> None:
    long = "The parcel is late, so please tell us the number of the order."
    found = held_out({"late": long, "money": "refund"})
    found.ask_before()
    assert [question for question, _ in found.model.asked] == ["late"]
    assert "right" not in evaluated(found, 0) | evaluated(found, 4)
    assert found.score([evaluated(found, 4)]) == {}
    found.model.says = lambda _: long
    found.show()
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3:] == [f"expected  {long}</s>", "before    what?", f"after     {long}"]


def test_counts_in_between_take_less_than_a_tenth_of_the_training(held_out: Callable[..., HeldOutAnswers]) -> None:
    """Of six evaluations, four are neither the first nor the last."""
    found = held_out(MAILS)
    found.seconds = 2.0
    assert found.time_needed(81, evaluations=6) == 2 * 2 + 4 * 2
    assert found.each
    assert found.time_needed(79, evaluations=6) == 2 * 2
    assert not found.each


@pytest.mark.parametrize(("answer", "seconds"), [("yes", 6 * (1 + 11 * 2) / 3), ("a word " * 20, 30)])
def test_the_time_of_answers_is_measured_by_the_first_tokens_of_one(
    answer: str, seconds: float, held_out: Callable[..., HeldOutAnswers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token takes a second, and each other one two; three answers in a batch take as long as one alone. A
    long answer has 30 s."""
    found = held_out({f"{i}": answer for i in range(6)})
    monkeypatch.setattr(answers, "time", SimpleNamespace(perf_counter=lambda: sum(map(batch, found.model.asked))))

    def batch(asked: tuple[str, int]) -> float:
        return 1 + 2 * (asked[1] - 1)

    found.measure()
    assert found.seconds == pytest.approx(seconds)
    assert {most for _, most in found.model.asked} == {1, 4}


def test_at_most_200_are_asked_from_all_over_the_data(held_out: Callable[..., HeldOutAnswers]) -> None:
    found = held_out({f"{i}": "yes" for i in range(500)})
    found.ask_before()
    assert [question for question, _ in found.model.asked] == [f"{i * 5 // 2}" for i in range(200)]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}]),
        Dataset.from_list([{"input_ids": [0, 5, 6], "labels": [-100, 5, 6]}]),
    ],
    ids=["none", "preferences", "a text"],
)
def test_data_without_questions_are_not_asked(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = HeldOutAnswers(None, None, rows)
    found.ask_before()
    found.show()
    assert found.time_needed(100, evaluations=6) == 0
    assert "right" not in evaluated(found, 4)
    assert capsys.readouterr().out == ""

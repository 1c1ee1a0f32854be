"""Which answers count as right, and which are short enough to be counted."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pissa.cli.score import are_short, is_right, most_frequent


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" Delivery.\n", "delivery", True),
        ("STRASSE", "straße", True),
        ("はい\uff01", "はい", True),
        ("<think>\nor a refund?\n</think>\n\ndelivery", "<think>\n\n</think>\n\nDelivery", True),
        ("<think>\ndelivery", "delivery", False),  # cut before it has answered
        ("delivery, or a refund", "delivery", False),
        ("not delivery", "delivery", False),
        ("", "delivery", False),
        ("3.5", "35", False),
        ("-3", "3", False),
        ("?", "!", False),
        ("?", "?", True),
    ],
)
def test_an_answer_is_right_apart_from_case_outer_spaces_and_end_punctuation(
    answer: str, expected: str, right: bool
) -> None:
    assert is_right(answer, expected) is right


def test_the_most_frequent_answer_counts_as_is_right_counts() -> None:
    assert most_frequent(["refund", "Delivery ", "refund", "delivery.", "delivery"]) == ("Delivery", 3)


@pytest.mark.parametrize(
    ("answers", "short"),
    [
        (["delivery", "42", "The Rolling Stones", "<think>\n" + 99 * "so " + "\n</think>\n\nyes"], True),
        (["delivery", "the parcel is late, and she wants it back"], False),
        (["delivery", "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk"], False),
        (["1\n2"], False),
    ],
)
def test_labels_numbers_and_names_are_short(answers: list[str], short: bool) -> None:
    assert are_short(answers) is short


def test_it_imports_nothing_heavy() -> None:
    script = "import sys, pissa.cli.score; print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"

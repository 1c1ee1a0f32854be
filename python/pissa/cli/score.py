"""Which answers are right: the only definition that the commands have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

RIGHT = "equal to the expected answer apart from case, outer spaces and end punctuation"
"""What `is_right` means by right."""

_ENDS = ".,;:!?…。\uff01\uff1f"
_LONGEST, _WORDS = 40, 5
"""The most characters and words of a short answer: a label, a number, a name, but rarely a sentence."""


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is `RIGHT`. The thoughts of a reasoning model, up to its last </think>, do not count."""
    return _plain(answer) == _plain(expected)


def most_frequent(expected: Sequence[str]) -> tuple[str, int]:
    """The answer that is most often right, and how often: what a model must surpass to have learned anything."""
    ((plain, count),) = Counter(map(_plain, expected)).most_common(1)
    return next(_said(text) for text in expected if _plain(text) == plain), count


def are_short(expected: Sequence[str]) -> bool:
    """Whether all answers are so short that there is one way to say each, and being equal is what matters."""
    said = [_said(text) for text in expected]
    return all(len(text) <= _LONGEST and len(text.split()) <= _WORDS and "\n" not in text for text in said)


def _said(answer: str) -> str:
    return answer.rpartition("</think>")[2].strip()


def _plain(answer: str) -> str:
    said = _said(answer).casefold()
    return said.rstrip(_ENDS).rstrip() or said  # of an answer that is only punctuation, all counts

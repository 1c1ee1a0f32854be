"""Scores that lm-eval has no metric for."""

from __future__ import annotations

from math_verify import parse, verify

_MARKER = "The answer is:"
"""What stands before the answer in MetaMathQA."""


def exact(document: dict[str, str], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == document["answer"].strip())}


def mathematical(document: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether the answer equals that of the solution, `document["answer"]`.

    math-verify limits its time by a signal, so that this works in a process's main thread only.
    """
    return {"math_verify": float(verify(parse(document["answer"]), parse(_marked(results[0]))))}


def _marked(text: str) -> str:
    """The text; or the answer after the marker in a box, for math-verify knows no LaTeX without marks around it."""
    _, marker, answer = text.rpartition(_MARKER)
    if not marker:
        return text
    line = answer.strip().partition("\n")[0]
    return rf"$\boxed{{{line.rstrip('. ').strip('$')}}}$"

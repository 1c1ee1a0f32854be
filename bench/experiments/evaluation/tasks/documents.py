"""What lm-eval takes as a data set: documents that the caller has made."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def made(documents: list[dict[str, str]], **_: Any) -> dict[str, Dataset]:
    """`documents` have "prompt" and "answer"; lm-eval gives them, and more that is not used, from a task's metadata."""
    return {"test": Dataset.from_list(documents)}

"""What docs/compatibility.md promises is as it was when it was promised."""

from __future__ import annotations

import pytest

import promises
from pissa.adapters.pissa_layout import FORMAT

WHAT_TO_DO = """
Whatever worked must go on working: a new parameter has a default and comes last. If it does, or a name is new, run
`python tests/python/support/promises.py` and commit what it writes. What is gone comes back; if it has been deprecated
for a minor version (docs/compatibility.md), list it under Removed in CHANGELOG.md instead, and write anew."""


@pytest.mark.parametrize("file", promises.KEPT)
def test_all_is_as_promised(file: str) -> None:
    kept = (promises.FOLDER / file).read_text().splitlines()
    assert len(kept) > 10
    assert promises.KEPT[file]() == kept, WHAT_TO_DO


def test_every_format_of_adapters_that_was_ever_written_is_tested() -> None:
    for number in range(1, FORMAT + 1):
        assert (promises.FOLDER / f"format_{number}" / "pissa.json").is_file(), f"no adapter of format {number} is kept"

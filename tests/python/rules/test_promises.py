"""What docs/compatibility.md promises is as it was when it was promised."""

from __future__ import annotations

import pytest

import promises
from pissa.files import record


@pytest.mark.parametrize("file", promises.KEPT)
def test_all_is_as_promised(file: str) -> None:
    kept = (promises.FOLDER / file).read_text().splitlines()
    assert len(kept) > 10
    found = list(promises.differences(kept, promises.KEPT[file]()))
    assert not found, "\n".join(found)


def test_every_format_of_adapters_that_was_ever_written_is_tested() -> None:
    for number in range(1, record.FORMAT + 1):
        assert (promises.FOLDER / f"format_{number}" / "pissa.json").is_file(), f"no adapter of format {number} is kept"

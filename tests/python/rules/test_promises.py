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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pissa::residual(Tensor weight, float scaling) -> Tensor", "pissa::residual(Tensor weight) -> Tensor"),
        ("pissa.load(folder: str, *, device: str = 'cpu')", "pissa.load(folder: str, *, on: str = 'cpu')"),
        ("pissa.load(folder: str, *, device: str = 'cpu')", "pissa.load(folder: str, *, device: str = 'cuda')"),
        ("pissa.RankError: class", "pissa.RankError: data"),
    ],
)
def test_each_kind_of_change_is_found(before: str, after: str) -> None:
    def said(kept: list[str], found: list[str]) -> str:
        return "\n".join(promises.differences(kept, found))

    other = "pissa.other: class"
    name = before.partition("(")[0].removesuffix(": class")
    assert said([before, other], [other, before]) == ""
    assert said([other], [other, before]).startswith(f"{name} is new, and not promised yet: run `python tests/")
    assert said([before, other], [other]).startswith(f"{name} is promised, and gone: bring it back.")
    assert f"{name} is not as promised.\n  promised: {before}\n  now:      {after}\n" in said([before], [after])


def test_every_format_of_adapters_that_was_ever_written_is_tested() -> None:
    for number in range(1, record.FORMAT + 1):
        assert (promises.FOLDER / f"format_{number}" / "pissa.json").is_file(), f"no adapter of format {number} is kept"

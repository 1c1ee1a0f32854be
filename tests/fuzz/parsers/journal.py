"""The notes of an unfinished run: its identity, and a line for each unit of work that is done."""

from __future__ import annotations

from pathlib import Path

from pissa.checkpoints import journal

FILE = "identity.json"
IDENTITY = {"rank": 4, "patterns": {"q": 8}, "source": {"a": "12 bytes"}, "init": "pissa"}


def parse(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / "000000.jsonl").write_bytes(data)
    assert all(isinstance(unit, str) for unit in journal._read(folder / "000000.jsonl"))
    try:
        journal.check(folder, IDENTITY)
    except ValueError as error:
        named = str(folder) in str(error)  # the file only if it cannot be read
        raise ValueError(f"{FILE if named else ''}: {error}") from error

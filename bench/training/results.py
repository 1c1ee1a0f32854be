"""A file of results: a line of JSON for each cell, which is not run again, and for whatever else was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from bench.compare.packages import version
from bench.compare.svd_quality import machine

CellT = TypeVar("CellT", bound=NamedTuple)


class Results(Generic[CellT]):
    """The lines of a file. `cell` is the class of what a cell is called: a line that has all its fields is a cell."""

    def __init__(self, path: Path, cell: type[CellT]) -> None:
        self._path = path
        self._cell = cell
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def cells(self) -> dict[CellT, dict[str, Any]]:
        fields = self._cell._fields
        return {self._cell(*(r[field] for field in fields)): r for r in self.records if r.keys() >= set(fields)}

    def add(self, record: dict[str, Any]) -> None:
        """Adds a line, with the machine and the versions of the packages."""
        packages = {name: version(name) for name in ("pissa", "torch", "transformers", "peft")}
        record |= {"machine": machine(), "packages": packages}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)

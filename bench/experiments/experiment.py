"""The definition of an experiment: the cells that it wants, given the known ones, and the section made of these."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

Result = dict[str, Any]
"""What a cell has measured; JSON can hold it."""


@dataclass(frozen=True)
class Options:
    """The options of the command line that apply to all cells."""

    model: str | None = None
    """A folder or a name on the hub, in the place of the experiment's own model."""
    data: tuple[tuple[str, Path], ...] = ()
    """Files and folders of data: the name of what needs them, and where they are."""
    quick: bool = False
    """Tiny random models, few steps and few cells: whether everything runs, not what comes out."""

    def path(self, name: str) -> Path:
        """The path of the data of that name.

        Raises:
            SystemExit: they were not given.
        """
        paths = dict(self.data)
        if name not in paths:
            raise SystemExit(f"needs data: --data {name}=PATH; bench/experiments/PROTOCOL.md says what they are")
        return paths[name]


@dataclass(frozen=True)
class Cell(ABC):
    """What determines a result: fields of numbers and strings. `run` is called in its own process."""

    kind: ClassVar[str]
    """Names the file that results of this class are kept in."""

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def prepare(self, options: Options) -> None:  # noqa: B027  most cells share nothing
        """Loads what cells share, in the process from which each cell's process is forked."""

    @abstractmethod
    def run(self, options: Options) -> Result:
        """Measures."""


class Known:
    """The results of finished cells."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, dict[str, Any]]] = {}

    def put(self, kind: str, record: dict[str, Any]) -> None:
        self._records.setdefault(kind, {})[json.dumps(record["cell"], sort_keys=True)] = record

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self._records.get(cell.kind, {})

    def __getitem__(self, cell: Cell) -> Result:
        return self.record(cell)["result"]

    def record(self, cell: Cell) -> dict[str, Any]:
        """The whole line: cell, result, seconds, machine, packages, state of the sources."""
        return self._records[cell.kind][cell.key]

    def __len__(self) -> int:
        return sum(map(len, self._records.values()))


@dataclass(frozen=True)
class Section:
    """The output of an experiment: a part of the page, and its pictures."""

    text: str
    """Markdown below the title: a table or a picture, and one sentence of meaning."""
    pictures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """matplotlib figures by the name of their file."""


class Experiment(ABC):
    """A claim of the paper and what decides it."""

    name: ClassVar[str]
    """What the command line calls it."""
    title: ClassVar[str]
    claim: ClassVar[str]
    """What the paper says, with its figure or table."""

    @abstractmethod
    def wanted(self, known: Known, options: Options) -> list[Cell]:
        """All cells that the page needs, known ones included, the most important first. It is asked again after each
        cell: a sweep goes on beyond an end that is the best, seeds follow at the best rate."""

    @abstractmethod
    def section(self, known: Known, options: Options) -> Section:
        """The section of the page, made from the known cells. Missing results are shown as missing."""

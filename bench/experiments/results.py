"""Files of results: a line of JSON for each finished cell, and a file for each kind of cell."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from bench.compare.records import machine, version
from bench.experiments.experiment import Cell, Known, Result

PACKAGES = ("pissa", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "numpy")


class Results(Known):
    """The results in a folder. `add` writes there."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            SystemExit: a line is no record, naming file and line.
        """
        super().__init__()
        self._folder = folder
        for path in sorted(folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                try:
                    self.put(path.stem, json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise SystemExit(
                        f"{path}, line {number}: no record of a cell ({error}); an interrupted write leaves such a "
                        "line: delete it, and its cell is run again"
                    ) from error

    def add(self, cell: Cell, result: Result, seconds: dict[str, float]) -> None:
        """Writes a line in one piece, so that it is there as a whole or not at all.

        Args:
            seconds: of the whole cell, "wall" and "processor".
        """
        record: dict[str, Any] = {
            "cell": dataclasses.asdict(cell),
            "result": result,
            "seconds": seconds,
            "machine": machine(),
            "packages": {name: found for name in PACKAGES if (found := version(name))},
            "sources": sources(),
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{cell.kind}.jsonl").open("a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
        self.put(cell.kind, record)


@cache
def sources() -> str:
    """The commit of this checkout, "+" after it if files differ from it; "unknown" outside one, or without git."""
    if not shutil.which("git"):
        return "unknown"
    here = Path(__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/python", ":/cpp", ":/bench/**.py")
    return f"{commit}{'+' if changed else ''}" or "unknown"

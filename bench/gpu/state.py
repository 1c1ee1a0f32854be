"""How far earlier runs came with this state of the sources on this card: what has passed is not repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from bench.gpu.machine import ROOT, Machine
from bench.gpu.stages import Outcome

SOURCES = ("CMakeLists.txt", "pyproject.toml", "cpp", "python", "tests", "bench/cpp", "bench/compare", "bench/gpu")


def tree() -> str:
    """A fingerprint of the sources, whether they are committed or not. There need not be a git."""
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class State:
    """The outcomes of parts, in a file. They are forgotten when the sources or the card have changed."""

    def __init__(self, machine: Machine) -> None:
        self._path = machine.build / "state.json"
        self.key = {"tree": tree(), "card": machine.card, "rehearsal": machine.rehearsal}
        found = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.known = all(found.get(name) == value for name, value in self.key.items())
        parts = found["parts"] if self.known else {}
        self.parts = {name: Outcome(**part) for name, part in parts.items()}

    def passed(self, name: str) -> bool:
        return name in self.parts and self.parts[name].how == "passed"

    def forget(self, names: Collection[str]) -> None:
        self.parts = {name: outcome for name, outcome in self.parts.items() if name not in names}

    def write(self) -> None:
        parts = {name: asdict(outcome) for name, outcome in self.parts.items()}
        write(self._path, json.dumps(self.key | {"parts": parts}, indent=1))


def write(path: Path, text: str) -> None:
    """Replaces a file at once: whoever reads it meanwhile, or after an end of this process, finds a whole one."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.rename(path)

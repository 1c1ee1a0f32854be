"""pissa.json."""

from __future__ import annotations

from pathlib import Path

from pissa.adapters.pissa_layout import AdapterRecord

FILE = "pissa.json"


def parse(folder: Path) -> None:
    AdapterRecord.read(folder / FILE)

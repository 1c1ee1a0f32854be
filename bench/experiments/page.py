"""The page: README.md and its pictures, out of the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.experiments.experiment import Experiment, Known, Options


def write_page(experiments: Sequence[Experiment], known: Known, options: Options, folder: Path) -> None:
    """Writes README.md, and pictures into pictures/."""

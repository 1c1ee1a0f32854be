"""The trainings in bench/results/experiments, and how the book's pictures look.

The same numbers give the same bytes. Pictures are as wide as a page's text, with letters of 8 points.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from bench.pictures import LORA, PISSA

DATA = Path(__file__).parents[1] / "results" / "experiments"

# ---- The results -----------------------------------------------------------------------------------------------------


@cache
def losses(task: str, method: str, seed: int = 0) -> dict[float, float]:
    """The held-out losses after trainings at rank 16 by their rates, ascending; infinite where a training diverged."""
    wanted = {"task": task, "method": method, "seed": seed, "r": 16}.items()
    lines = map(json.loads, (DATA / "language.jsonl").read_text().splitlines())
    found = {line["cell"]["rate"]: line["result"]["after"]["loss"] for line in lines if line["cell"].items() >= wanted}
    return {rate: math.inf if found[rate] is None else found[rate] for rate in sorted(found)}


# ---- How pictures look -----------------------------------------------------------------------------------------------

WIDTH = 6.5  # inches: A4's text
DPI = 130
COLORS = 64  # of a PNG's palette: less than half of the bytes. 32 turn blue beside many others into green

mpl.rcParams.update(
    {
        "font.size": 8.5,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "axes.grid": True,
        "grid.color": "0.9",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
    }
)


class Style(NamedTuple):
    """The name and the look of a line. In grey, the marker distinguishes it from others."""

    label: str
    color: str
    marker: str

    @property
    def look(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker}


STYLES = {"lora": Style("LoRA", LORA, "o"), "pissa": Style("PiSSA", PISSA, "D")}


def panels(titles: Sequence[str], columns: int | None = None, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title. Unlike pyplot's it needs no window system, and nobody else sees it.

    Args:
        columns: all side by side if not given.
        height: of a panel in inches.
    """
    columns = columns or len(titles)
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(WIDTH, 0.45 + rows * height), dpi=DPI, layout="constrained")
    axes = [figure.add_subplot(rows, columns, 1 + i) for i in range(len(titles))]
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, loc="left")
    return figure, axes


def note(figure: Figure, text: str) -> None:
    """A line below all panels of a figure that has no legend."""
    figure.supxlabel(text, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG with a palette, without a date or a program's version in it."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)

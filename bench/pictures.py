"""The picture of what runs have learned, and the colours that all pictures of bench and of the book use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pissa.containers.staged import staged

# A method has one colour everywhere, of Okabe and Ito's, which every kind of colour blindness distinguishes.
LORA, PISSA, QPISSA, QLORA = "#0072B2", "#D55E00", "#CC79A7", "#009E73"

STYLES: dict[str, dict[str, Any]] = {
    "PiSSA": {"color": PISSA, "linestyle": "-"},
    "QPiSSA": {"color": QPISSA, "linestyle": (0, (5, 1.5))},
    "LoRA": {"color": LORA, "linestyle": (0, (1, 1.2))},
    "QLoRA": {"color": QLORA, "linestyle": (0, (3, 1, 1, 1))},
}
"""Line styles by method, so that lines are distinguishable in grey."""

_PAGE = {
    "axes.formatter.min_exponent": 2,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "grid.color": "0.85",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


@mpl.rc_context(_PAGE)
def draw_learning(
    runs: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    right: Mapping[str, int],
    chance: int,
    of: int,
    path: Path,
    title: str,
) -> None:
    """Draws what runs have learned, and writes a PNG: on the left their losses in nats per answer token, of the steps
    (lines) and held out (points); on the right the number of right answers.

    Args:
        runs: by method: `losses` and `held_out`, each pairs of a step and a loss.
        right: right answers of `of`, "before" and by method.
        chance: right answers of somebody who always gives the most frequent one: a dashed line.
    """
    # The object interface needs no window system and no global state of pyplot.
    figure = Figure(figsize=(9.6, 4.2))
    figure.suptitle(title, x=0.01, ha="left")
    losses, scores = figure.subplots(1, 2, width_ratios=(3, 2))
    for method, run in runs.items():
        style = STYLES[method]
        losses.plot(*zip(*run["losses"], strict=True), linewidth=1.6, label=f"{method}, in training", **style)
        losses.plot(
            *zip(*run["held_out"], strict=True), color=style["color"], linestyle="", marker="o", label="held out"
        )
    losses.legend(labelcolor="linecolor")
    losses.set(title="loss, nats per answer token", xlabel="optimiser step")
    losses.set_ylim(bottom=0)
    losses.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    names = ["before", *(f"after {method}" for method in runs)]
    colours = ["0.6", *(STYLES[method]["color"] for method in runs)]
    bars = scores.bar(names, [right["before"], *(right[method] for method in runs)], color=colours, width=0.6)
    scores.bar_label(bars)
    scores.axhline(chance, color="0.2", linewidth=1, linestyle="--")
    label = f"always the same\nanswer: {chance}"
    scores.annotate(label, (-0.4, chance), (0, 3), textcoords="offset points", fontsize=8)
    scores.set(title=f"right answers, of {of}", ylim=(0, of))
    scores.grid(axis="x", visible=False)
    scores.set_axisbelow(True)
    scores.yaxis.set_major_locator(MaxNLocator(integer=True))
    with staged(path.parent) as new:
        figure.savefig(new(path.name), format="png")

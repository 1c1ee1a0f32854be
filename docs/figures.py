"""Draws the pictures of the book and the README from committed data: `make figures`.

python docs/figures.py    # writes docs/pictures/*.png and bench/experiments/pictures/*.png
"""

from __future__ import annotations

import ast
import io
import json
import runpy
import tokenize
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from bench import pictures
from bench.experiments import figures
from bench.experiments.figures import Axes, Figure, Sweep, loss_of

HERE = Path(__file__).parent
DATA = HERE.parent / "bench" / "results"
TUNED, FROZEN, TRAINED = "#E8A87C", "0.85", pictures.PISSA

# Rows of bench/compare, and the labels of their bars.
WORK = {
    "training step of SmolLM2-135M, nf4, r = 16": "training step, SmolLM2-135M",
    "training step of Llama-3.2-1B's shape, nf4, r = 16": "training step, Llama-3.2-1B's shape",
    "forward, nf4, r = 64, M = 16": "layer forward, 16 tokens",
    "forward, nf4, r = 64, M = 512": "layer forward, 512 tokens",
    "forward + backward, nf4, r = 64, M = 16": "layer forward + backward, 16 tokens",
    "forward + backward, nf4, r = 64, M = 512": "layer forward + backward, 512 tokens",
    "forward + backward, nf4, r = 64, M = 2048": "layer forward + backward, 2048 tokens",
    "QPiSSA's split, r = 128: SVD, residual, nf4 with nested scales": "start: SVD and rounding of a weight",
}


def speed() -> Figure:
    """How many times as long PEFT with bitsandbytes takes, with its default settings and with its best ones."""
    files = [json.loads((DATA / name).read_text()) for name in ("zen4_2_cores.json", "zen4_2_cores_models.json")]
    rows: dict[tuple[str, str], Any] = {}
    for row in (row for file in files for row in file["rows"]):
        known = rows.setdefault((row["work"], row["setting"]), row)
        if row["ratio_median"] < known["ratio_median"]:  # of PEFT in bfloat16 and in float32, the faster
            rows[row["work"], row["setting"]] = row
    figure, (axes,) = figures.panels(["How many times as fast as PEFT + bitsandbytes, 4 bits, on a CPU"], height=3.2)
    for place, work in enumerate(WORK):
        for setting, offset, color in (("default", -0.19, pictures.PISSA), ("tuned", 0.19, TUNED)):
            row = rows.get((work, setting))
            if row is not None:
                low, high = row["ratio_quartiles"]
                ratio = row["ratio_median"]
                axes.barh(place + offset, ratio, 0.36, color=color, hatch="" if setting == "default" else "///")
                axes.plot([low, high], [place + offset] * 2, color="black", linewidth=1)
                axes.text(high + 0.08, place + offset, f"{ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(WORK)), list(WORK.values()))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 8.2)
    axes.set_xlabel("time of PEFT + bitsandbytes / time of pissa")
    handles = [
        Rectangle((0, 0), 1, 1, color=pictures.PISSA, label="against PEFT as installed"),
        Rectangle((0, 0), 1, 1, facecolor=TUNED, hatch="///", label="against PEFT tuned (*)"),
    ]
    axes.legend(handles=handles, loc="center right", bbox_to_anchor=(1, 0.29), frameon=False)  # next to short bars
    figures.note(
        figure,
        "two Zen 4 cores; a layer of 4096 x 4096, r = 64; step: r = 16; start: 4096 x 4096, r = 128\n"
        "medians and quartiles of 5 to 15 pairs of runs\n"
        "(*) PEFT's adapters in bfloat16; for both sides a malloc that keeps freed memory",
    )
    return figure


def valley() -> Figure:
    """Held-out loss against the learning rate for PiSSA and LoRA, in two trainings. The grey area lies between the
    largest rate at which PiSSA is ahead and the smallest at which LoRA is."""
    figure, (left, right) = figures.panels(["40 steps", "24 steps"], height=2.8)
    for axes, task, top in ((left, "gsm8k", 1), (right, "gsm8k_24", 1.6)):
        _valleys(axes, Sweep(task, "lora").losses, Sweep(task, "pissa").losses, top)
    for name in ("lora", "pissa"):
        sweep = Sweep("gsm8k", name)
        seeds = [loss_of(result) for result in sweep.seeds(1, 2)]
        left.plot([sweep.best] * len(seeds), seeds, linestyle="", markersize=3, **figures.style(name).point)
    left.set_ylabel("held-out loss (nats)")
    figures.note(
        figure,
        "SmolLM2-135M-Instruct on GSM8K, 16 bits, rank 16, 2 problems a step; held-out problems differ by panel\n"
        "lines: seed 0; small marks: seeds 1 and 2 at each method's best rate",
    )
    return figure


def _valleys(axes: Axes, lora: dict[float, float], pissa: dict[float, float], top: float) -> None:
    both = lora.keys() & pissa.keys()
    ahead = max(rate for rate in both if pissa[rate] < lora[rate])
    behind = min(rate for rate in both if lora[rate] < pissa[rate])
    axes.axvspan(ahead, behind, color="0.92", zorder=0)
    for name, losses in (("lora", lora), ("pissa", pissa)):
        axes.plot(list(losses), list(losses.values()), **figures.style(name).line)
    axes.set_xscale("log")
    axes.set_xlim(4e-5, 1.5e-2)
    axes.set_ylim(0.64, top)
    axes.set_xlabel("learning rate")
    for name, end, place in (("pissa", "right", ahead / 1.15), ("lora", "left", behind * 1.15)):
        look = {"color": figures.style(name).color, "fontweight": "bold", "backgroundcolor": "white"}
        text = f"{figures.style(name).label} ahead"
        axes.text(place, 0.95, text, ha=end, va="top", transform=axes.get_xaxis_transform(), **look)


# The ways of a merge into few bits, in bench/results/merge_share.json: label, colour, marker.
WAYS = {
    "nearest": ("to the nearest code", "0.5", "X"),
    "dither": ("at random", "#56B4E9", "o"),
    "feedback": ("error feedback", "#E69F00", "s"),
    "feedback, dither": ("at random, with feedback", "#0072B2", "D"),
    "through": ("trained through the rounding", "black", "|"),
}


def merges() -> Figure:
    """What a merge into few bits keeps of a training's gain, by the way of rounding. Seeds are averaged."""
    rows = json.loads((DATA / "merge_share.json").read_text())["rows"]
    names = [f"{row['of'].removesuffix('.gguf').replace('-Instruct', '')}, {row['steps']} steps" for row in rows]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    figure, (axes,) = figures.panels(["kept of the gain in held-out loss"], height=3.6)
    for way, (label, color, marker) in WAYS.items():
        kept: dict[str, list[float]] = {}
        for name, row in zip(names, rows, strict=True):
            if (share := row.get(f"kept, {way}")) is not None:
                kept.setdefault(name, []).append(100 * share)
        points = [fmean(shares) for shares in kept.values()], [places[name] for name in kept]
        axes.scatter(*points, s=60 if marker == "|" else 28, color=color, marker=marker, label=label, zorder=3)
    axes.set_yticks(range(len(places)), list(places))
    axes.invert_yaxis()
    axes.set_xlim(-4, 104)
    axes.set_xlabel("% (100: the adapter beside the base)")
    axes.legend(loc="center left", bbox_to_anchor=(0.12, 0.5), frameon=True)
    figures.note(figure, "SmolLM2-135M where no model is named; LoRA, rank 16, on GSM8K, 2 problems a step")
    return figure


def split() -> Figure:
    """A weight, its singular values, and its two parts."""
    figure, axes = figures.panels(["the weight's singular values", "what becomes of them"], height=2.2)
    values = 3.2 * np.arange(1, 33) ** -0.55
    r = 6
    axes[0].bar(range(1, r + 1), values[:r], color=TRAINED, width=0.8)
    axes[0].bar(range(r + 1, 33), values[r:], color=FROZEN, edgecolor="0.6", width=0.8)
    axes[0].annotate("the r largest:\nthe adapter", (3, values[2]), (9, 2.6), arrowprops={"arrowstyle": "-"})
    axes[0].annotate("the rest: frozen", (20, values[19]), (17, 1.5), arrowprops={"arrowstyle": "-"})
    axes[0].set(xticks=[], yticks=[], xlabel="component", ylabel="singular value")
    _canvas(axes[1], (0, 13), (0, 6))
    _box(axes[1], 0.3, 1, 4, 4, "W", "0.95")
    _text(axes[1], 4.8, 3, "=")
    _box(axes[1], 5.3, 1, 4, 4, "residual:\nfrozen,\nstored only if\nquantised", FROZEN)
    _text(axes[1], 9.8, 3, "+")
    _box(axes[1], 10.2, 1, 0.8, 4, "B", TRAINED)
    _box(axes[1], 11.2, 4.2, 1.7, 0.8, "A", TRAINED)
    _text(axes[1], 12.1, 3.2, "trained")
    return figure


def fused() -> Figure:
    """The memory that a 4-bit layer touches, in separate steps and fused."""
    figure, (apart, one) = figures.panels(["separate steps", "fused"], columns=1, height=1.25)
    for axes in (apart, one):
        _canvas(axes, (0, 20), (0, 4))
    _box(apart, 0.2, 1, 2, 2, "4 bits", FROZEN)
    _arrow(apart, 2.3, 4.2, "decode")
    _box(apart, 4.3, 0.4, 3.2, 3.2, "dense copy\nof W", "0.95")
    _arrow(apart, 7.6, 9.8, "x Wᵀ")
    _box(apart, 9.9, 1, 2.2, 2, "output", "0.95")
    _arrow(apart, 12.2, 14.2, "+ s x AᵀBᵀ")
    _box(apart, 14.3, 1, 2.2, 2, "another\ncopy", "0.95")
    _arrow(apart, 16.6, 17.6, "sum")
    _box(apart, 17.7, 1, 2.2, 2, "y", "0.95")
    _box(one, 0.2, 1, 2, 2, "4 bits", FROZEN)
    _box(one, 2.5, 1, 1.2, 2, "A, B", TRAINED)
    _arrow(one, 3.9, 14.2, "one product: blocks are decoded in the cache")
    _box(one, 14.3, 1, 2.2, 2, "y", "0.95")
    return figure


def rooms() -> Figure:
    """The rooms of python/pissa from the highest down: their lines of code, and which rooms their modules import."""
    package = HERE.parent / "python" / "pissa"
    tests = runpy.run_path(str(HERE.parent / "tests" / "python" / "rules" / "test_rooms.py"))
    names, room_of = list(reversed(tests["ROOMS"])), tests["room_of"]
    files = {name: [*(package / name).rglob("*.py"), *package.glob(f"{name}.py")] for name in names}
    lines = {name: sum(map(_lines_of_code, files[name])) for name in names}
    pairs = Counter(
        (room_of(module), room)
        for module in tests["MODULES"].keys() - tests["FACE"]
        for room in {room_of(name) for name in tests["IMPORTS"][module] if name.startswith("pissa.")}
    )
    figure, (bars, dots) = figures.panels(["lines of code", "modules that import each room"], height=3.4)
    for axes in (bars, dots):
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
    bars.barh(range(len(names)), [lines[name] for name in names], color=TRAINED)
    bars.grid(axis="y", visible=False)
    for row, name in enumerate(names):
        bars.text(lines[name] + 30, row, f"{lines[name]:,}", va="center", fontsize=7.5)
    bars.set_xlim(0, 1.25 * max(lines[name] for name in names))
    columns = [*names, "_C"]
    for (importer, imported), count in pairs.items():
        place = columns.index(imported), names.index(importer)
        dots.scatter(*place, s=140, color="0.88" if importer == imported else TUNED, linewidth=0)
        dots.text(*place, str(count), ha="center", va="center", fontsize=7)
    dots.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    dots.set_ylim(len(names) - 0.4, -0.6)
    return figure


_NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def _lines_of_code(path: Path) -> int:
    """Without docstrings, comments and blank lines."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {line for token in tokens if token.type not in _NOT_CODE for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def _canvas(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis("off")


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="black", linewidth=0.8))
    ink = "white" if color == TRAINED else "black"
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=ink)


def _arrow(axes: Axes, start: float, end: float, text: str) -> None:
    axes.add_patch(FancyArrowPatch((start, 2), (end, 2), arrowstyle="-|>", mutation_scale=9, color="black"))
    axes.text((start + end) / 2, 2.25, text, ha="center", va="bottom", fontsize=7.5)


def _text(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center")


PICTURES: dict[str, Callable[[], Any]] = {draw.__name__: draw for draw in (speed, valley, merges, split, fused, rooms)}


def main() -> None:
    for name, draw in PICTURES.items():
        figures.save(draw(), HERE / "pictures" / f"{name}.png")
    figures.main()


if __name__ == "__main__":
    main()

"""bench.experiments: the page's numbers and pictures are those of the committed results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "bench" / "experiments"


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def rows_of(title: str) -> list[list[str]]:
    """The rows of the table below a line of the page, without bold."""
    page = (PAGE / "README.md").read_text().replace("**", "")
    table = page.partition(f"\n{title}\n\n")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def shown(values: Any, digits: int) -> str:
    text = f"{values.mean:.{digits}f}"
    return f"{text} ± {values.deviation:.{digits}f}" if values.n > 1 else text


@pytest.mark.parametrize("task", ["gsm8k", "sums"])
def test_the_page_has_the_numbers_of_the_results(task: str) -> None:
    """Rates, losses, their differences and accuracies of every method."""
    from bench.experiments.figures import DENSE, FOUR_BIT, TASKS, Sweep, accuracy, style

    lora = Sweep(task, "lora").spread()
    rows = {row[0]: row[1:] for row in rows_of(f"{TASKS[task]}, rank 16")}
    methods = (*DENSE, *FOUR_BIT) if task == "gsm8k" else DENSE
    assert len(rows) == len(methods)
    for method in methods:
        sweep, row = Sweep(task, method), rows[style(method).label]
        assert float(row[0]) == sweep.best
        assert row[1] == shown(sweep.spread(), 4)
        if task == "sums":
            assert row[2] == shown(sweep.spread(accuracy), 1)
        if method != "lora":
            gap = sweep.spread().less(lora)
            assert row[-6] == f"{gap.mean:+.4f} ± {2 * gap.error:.4f}"


def test_the_width_of_a_parabola_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + c x² is 2% above its least value at x = ± sqrt(0.02 / c). A line between points h apart is above the
    parabola by c h² / 4 at most: it crosses where x² is less than 0.02 / c by h² / 4 at most."""
    from bench.experiments import figures

    rates = [digit * 10.0**-power for power in range(6, 0, -1) for digit in (1, 2, 5)]
    for c in (0.05, 0.1, 0.5):
        known = {
            ("lora", 16, rate, 0, "auto", "films"): {"after": {"loss": 1 + c * math.log10(rate / 1e-3) ** 2}}
            for rate in rates
        }
        monkeypatch.setattr(figures, "results", lambda kind, known=known: known)
        half = math.sqrt(0.02 / c)
        least = math.sqrt(half**2 - math.log10(2.5) ** 2 / 4)
        sweep = figures.Sweep("films", "lora")
        assert sweep.best == pytest.approx(1e-3)
        assert 2 * least - 1e-9 <= sweep.width <= 2 * half + 1e-9


def test_a_training_that_diverged_is_neither_the_best_nor_in_the_valley(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.experiments import figures

    losses = {5e-4: 1.01, 1e-3: 1.0, 2e-3: None}
    known = {("lora", 16, rate, 0, "auto", "films"): {"after": {"loss": loss}} for rate, loss in losses.items()}
    monkeypatch.setattr(figures, "results", lambda kind: known)
    sweep = figures.Sweep("films", "lora")
    assert sweep.best == 1e-3
    assert sweep.width == pytest.approx(math.log10(2))


@pytest.mark.nightly
def test_the_pictures_are_those_of_the_results(tmp_path: Path) -> None:
    """But for letters, which another release of matplotlib draws elsewhere by a pixel."""
    import numpy as np
    from PIL import Image

    from bench.experiments.figures import PICTURES, save

    shown = re.findall(r"\]\(pictures/([\w-]+)\.png\)", (PAGE / "README.md").read_text())
    assert {path.stem for path in (PAGE / "pictures").iterdir()} == set(shown) >= PICTURES.keys()
    for name, draw in PICTURES.items():
        save(draw(), tmp_path / "new.png")
        new, old = (
            np.asarray(Image.open(path).convert("RGB"), dtype=int)
            for path in (tmp_path / "new.png", PAGE / "pictures" / f"{name}.png")
        )
        assert new.shape == old.shape, name
        assert (abs(new - old).max(axis=-1) > 64).mean() < 0.01, name


def test_a_method_has_one_colour_in_all_pictures() -> None:
    """In those of the demo too. What a legend calls QPiSSA is it at any number of alternations."""
    from bench.experiments.figures import style
    from bench.pictures import STYLES

    for method in ("lora", "pissa", "qpissa_1", "qpissa_5"):
        name = style(method).label.partition(",")[0]
        assert style(method).color == STYLES[name]["color"]
    assert style("loftq").color == style("LoftQ, T = 1").color
    assert len({style(method).color for method in ("lora", "pissa", "qpissa_1", "loftq")}) == 4

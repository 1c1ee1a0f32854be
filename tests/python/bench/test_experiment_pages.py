"""bench.experiments: the page is what the results make; which rates a sweep tries, and what is taken to differ."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have losses that are not reached, or by some seeds only, and differences that do not show."""
    from bench.experiments.__main__ import PAGE, main
    from bench.experiments.page import CONCLUSIONS, EARLIER

    for name in (CONCLUSIONS, EARLIER):
        (tmp_path / name).write_text((PAGE / name).read_text())
    monkeypatch.setattr("sys.argv", ["experiments", "--only-page", "--page", str(tmp_path)])
    assert main() == 0
    assert (tmp_path / "README.md").read_text() == (PAGE / "README.md").read_text()


def _sweep(best: float, curvature: float = 0.5, decades: float = math.inf, **fields: Any) -> tuple[Any, Any]:
    """A sweep about 1e-3, and all that it wants: the loss is a parabola over log10 of the rate, and training diverges
    beyond so many decades from the best one."""
    from bench.experiments.encoder import EncoderCell
    from bench.experiments.experiment import Known
    from bench.experiments.sweep import Sweep

    sweep, known = Sweep(EncoderCell("films", "lora", 16, 1e-3), **fields), Known()
    while missing := [cell for cell in sweep.wanted(known) if cell not in known]:
        for cell in missing:
            x = math.log10(cell.rate / best)
            loss = 1 + curvature * x**2 if abs(x) <= decades else None
            known.put(cell.kind, {"cell": asdict(cell), "result": {"after": {"loss": loss}}})
    return sweep, known


def test_a_sweep_goes_on_beyond_its_end_and_seeds_follow_at_the_best_rate() -> None:
    sweep, known = _sweep(2e-5)  # 2e-4 to 5e-3 at first
    assert sweep.best(known) == 2e-5
    assert list(sweep.losses(known)) == [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
    assert [cell.seed for cell in sweep.wanted(known) if cell.rate == 2e-5] == [0, 1, 2]
    assert len(known) == 11


def test_an_end_is_never_the_best() -> None:
    _, known = _sweep(2e-4, extends=False)
    sweep, _ = _sweep(2e-4)
    assert sweep.best(known) is None
    assert sweep.at_best(known) == []
    assert sweep.width(known) is None
    (new,) = (cell for cell in sweep.wanted(known) if cell not in known)
    assert new == sweep.at(1e-4)


def test_the_width_of_a_parabola_is_known() -> None:
    """1 + c x² is 2% above its least value at x = ± sqrt(0.02 / c). A line between points h apart is above the
    parabola by c h² / 4 at most: it crosses where x² is less than 0.02 / c by h² / 4 at most."""
    for curvature in (0.05, 0.1, 0.5):
        sweep, known = _sweep(1e-3, curvature, points=7)
        half = math.sqrt(0.02 / curvature)
        least = math.sqrt(half**2 - math.log10(2.5) ** 2 / 4)
        assert 2 * least - 1e-9 <= sweep.width(known) <= 2 * half + 1e-9
        assert sweep.bounded(known)


def test_a_valley_ends_at_once_where_training_diverged() -> None:
    from bench.experiments.sweep import spread
    from bench.experiments.tables import measured, winner

    sweep, known = _sweep(1e-3, decades=0)
    assert sweep.losses(known)[2e-3] == math.inf
    assert (sweep.best(known), sweep.width(known)) == (1e-3, 0)
    assert measured(spread([1.0, math.inf])) == "diverged"
    assert winner({"one": spread([1.0, 1.0]), "diverged": spread([2.0, math.inf])}) is None


def test_two_methods_differ_beyond_two_standard_errors_of_the_differences() -> None:
    """Differences d and -d about a gap have a deviation of d sqrt(2), so a standard error of d."""
    from bench.experiments.sweep import spread
    from bench.experiments.tables import differ, winner

    d, seeds = 0.01, (1.0, 1.5)  # the seeds lie far apart, which both methods share
    for factor, apart in ((1.99, False), (2.01, True)):
        gap = factor * d
        one, other = spread(seeds), spread((seeds[0] + gap + d, seeds[1] + gap - d))
        assert differ(one, other) is differ(other, one) is apart
        assert winner({"one": one, "other": other}) == ("one" if apart else None)
        assert winner({"one": one, "other": other}, largest=True) == ("other" if apart else None)
    assert winner({"one": spread([1.0]), "far": spread([9.0])}) is None


def test_a_method_has_one_colour_in_all_pictures() -> None:
    """In those of the demo too. What a legend calls QPiSSA is it at any number of alternations."""
    from bench.experiments.figures import style
    from bench.experiments.methods import METHODS
    from bench.pictures import STYLES

    for method in ("lora", "pissa", "qpissa_1", "qpissa_5"):
        name = METHODS[method].label.partition(",")[0]
        assert style(method).color == STYLES[name.partition(" ")[0]]["color"]
    assert style("loftq").color == style("LoftQ, T = 1").color
    assert len({style(method).color for method in ("lora", "pissa", "qpissa_1", "loftq")}) == 4

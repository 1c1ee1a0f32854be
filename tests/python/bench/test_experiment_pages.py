"""bench.experiments: tables, pictures and the page, out of results that a formula gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from experiment_results import fill, record

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def _sweep(method: str = "lora", middle: float = 1e-3, **fields: Any) -> Any:
    from bench.experiments.encoder import EncoderCell
    from bench.experiments.sweep import Sweep

    return Sweep(EncoderCell("films", method, 16, middle), **fields)


def _known(*sweeps: Any, loss: Any) -> Any:
    from bench.experiments.experiment import Known

    known = Known()
    fill(known, lambda: [cell for sweep in sweeps for cell in sweep.wanted(known)], loss)
    return known


def _parabola(best: float, curvature: float = 0.5, least: float = 1.0) -> Any:
    """A loss over log10 of the rate; seeds above 0 have 0.01 and 0.02 more."""
    return lambda cell: least + curvature * math.log10(cell.rate / best) ** 2 + 0.01 * cell.seed


def test_a_sweep_goes_on_beyond_its_end_and_seeds_follow_at_the_best_rate() -> None:
    sweep = _sweep()  # 2e-4 to 5e-3 at first
    known = _known(sweep, loss=_parabola(2e-5))
    assert sweep.best(known) == 2e-5
    assert list(sweep.losses(known)) == [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
    assert [cell.seed for cell in sweep.wanted(known) if cell.rate == 2e-5] == [0, 1, 2]
    assert len(known) == 11


def test_an_end_is_never_the_best() -> None:
    from bench.experiments.experiment import Known

    sweep, known = _sweep(), Known()
    for cell in sweep.wanted(known):
        known.put(cell.kind, record(cell, _parabola(2e-4)))
    assert sweep.best(known) is None
    assert sweep.at_best(known) == []
    assert sweep.width(known) is None
    (new,) = (cell for cell in sweep.wanted(known) if cell not in known)
    assert new == sweep.at(1e-4)


def test_a_rate_that_diverged_is_not_the_best_and_is_infinite() -> None:
    sweep = _sweep()
    known = _known(sweep, loss=lambda cell: math.inf if cell.rate > 1e-3 else _parabola(1e-3)(cell))
    assert sweep.losses(known)[2e-3] == math.inf
    assert sweep.best(known) == 1e-3


def test_the_width_of_a_parabola_is_known() -> None:
    """1 + c x² is 2 % above its least value at x = ± sqrt(0.02 / c). A line between points h apart is above the
    parabola by c h² / 4 at most: it crosses where x² is less than 0.02 / c by h² / 4 at most."""
    sweep = _sweep(points=7)
    for curvature in (0.05, 0.1, 0.5):
        known = _known(sweep, loss=_parabola(1e-3, curvature))
        half = math.sqrt(0.02 / curvature)
        least = math.sqrt(half**2 - math.log10(2.5) ** 2 / 4)
        assert 2 * least - 1e-9 <= sweep.width(known) <= 2 * half + 1e-9
        assert sweep.bounded(known)


def test_a_valley_that_leaves_the_sweep_is_a_bound() -> None:
    sweep = _sweep()
    known = _known(sweep, loss=_parabola(1e-3, 0.01))
    assert sweep.width(known) == pytest.approx(math.log10(5e-3 / 2e-4))
    assert not sweep.bounded(known)


def test_a_valley_ends_at_once_where_training_diverged() -> None:
    sweep = _sweep()
    known = _known(sweep, loss=lambda cell: 1.0 if cell.rate == 1e-3 else math.inf)
    assert sweep.width(known) == 0


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


def test_a_spread_has_the_deviation_of_its_seeds() -> None:
    from bench.experiments.sweep import spread

    found = spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2))
    assert found.error == pytest.approx(found.deviation / math.sqrt(3))


def test_only_seeds_that_both_have_are_compared() -> None:
    from bench.experiments.sweep import spread
    from bench.experiments.tables import difference

    assert difference(spread((1.0, 2.0, 9.0)), spread((0.5, 1.25))) == "**+0.6250 ± 0.2500**"


def test_a_difference_that_does_not_show_is_not_bold() -> None:
    """Nor has a zero the sign of roundoff."""
    from bench.experiments.sweep import spread
    from bench.experiments.tables import differ, difference

    one, other = spread((1.0, 2.0)), spread((1.00001, 2.00001))
    assert differ(one, other)
    assert difference(one, other) == "+0.0000 ± 0.0000"


def test_a_seed_counts_only_after_those_before_it() -> None:
    """Else the second value of two methods could be of different seeds."""
    sweep = _sweep(points=1, extends=False)
    known = _known(sweep, loss=_parabola(1e-3))
    assert len(sweep.at_best(known)) == 3
    known = type(known)()
    for seed in (0, 2):
        known.put("encoder", record(sweep.at(1e-3, seed), _parabola(1e-3)))
    assert len(sweep.at_best(known)) == 1


def test_with_one_seed_nothing_is_bold() -> None:
    from bench.experiments.sweep import spread
    from bench.experiments.tables import column, difference, winner

    one, far, seeds = spread([1.0]), spread([9.0]), spread([9.0, 9.0, 9.0])
    assert winner({"one": one, "far": far}) is None
    assert winner({"one": one, "far": seeds}) is None
    assert column({"one": one, "far": far}) == {"one": "1.0000", "far": "9.0000"}
    assert difference(one, far) == "-8.0000"


def test_bold_needs_a_difference_to_all_others() -> None:
    from bench.experiments.sweep import spread
    from bench.experiments.tables import column, winner

    first, near, far = spread([0.99, 1.01]), spread([1.01, 0.995]), spread([2.01, 1.99])
    assert winner({"first": first, "near": near, "far": far}) is None
    assert column({"first": first, "far": far, "none": None}) == {
        "first": "**1.0000 ± 0.0141**",
        "far": "2.0000 ± 0.0141",
        "none": "—",
    }
    assert winner({"first": first}) is None
    assert winner({"first": first, "far": far, "diverged": spread([2.0, math.inf])}) is None


def test_steps_to_a_loss_are_on_the_line_between_measurements() -> None:
    from bench.experiments.claims.few_steps import steps_to

    curve = [(0.0, 2.0), (8.0, 1.0), (16.0, 0.8), (24.0, 0.9), (32.0, 0.5)]
    assert steps_to(1.5, curve) == 4
    assert steps_to(0.85, curve) == pytest.approx(14)  # the first time
    assert steps_to(0.5, curve) == 32
    assert steps_to(0.49, curve) is None
    assert steps_to(2.0, curve) == 0


def test_a_loss_between_rates_is_on_the_line_over_their_logarithm() -> None:
    from bench.experiments.claims.suggested import interpolated

    losses = {1e-4: 3.0, 1e-3: 1.0, 1e-2: 2.0}
    assert interpolated(losses, 10**-3.5) == pytest.approx(2)
    assert interpolated(losses, 1e-2) == pytest.approx(2)
    assert interpolated(losses, 2e-2) is None
    assert interpolated(losses, 5e-5) is None


def _loss(cell: Any) -> float:
    """PiSSA's best rate is a quarter of LoRA's, and its loss there 0.01 less; a decade above it all diverge."""
    from bench.experiments import grid

    middles = grid._LANGUAGE if cell.kind == "language" else grid._ENCODER
    above = math.log10(cell.rate / middles[cell.method])
    least = 0.69 if cell.method == "pissa" else 0.7
    return math.inf if above > 1 else least + 0.1 * above**2 + 0.001 * cell.seed


SWEEPS = (
    *("methods", "equal-rates", "few-steps", "start-norm", "any-start", "nlu", "ranks", "components", "forgetting"),
    "suggested",
)
"""The experiments that are sweeps of trainings."""


@pytest.fixture(scope="module")
def everything() -> list[Any]:
    """The kind and the line of every cell that these experiments want, the most important first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from bench.experiments.experiment import Known, Options
        from bench.experiments.registry import EXPERIMENTS

        known = Known()
        wanted = lambda: [cell for name in SWEEPS for cell in EXPERIMENTS[name].wanted(known, Options())]  # noqa: E731
        fill(known, wanted, _loss)
        return [(cell.kind, known.record(cell)) for cell in dict.fromkeys(wanted())]


def _some(lines: list[Any]) -> Any:
    from bench.experiments.experiment import Known

    known = Known()
    for kind, line in lines:
        known.put(kind, line)
    return known


def test_what_is_measured_stands_in_the_tables(everything: list[Any]) -> None:
    """PiSSA's loss at its best rate is 0.69, 0.691 and 0.692; all others' are 0.01 more."""
    from bench.experiments.experiment import Options
    from bench.experiments.registry import EXPERIMENTS

    known, text = _some(everything), {}
    for name in SWEEPS:
        text[name] = EXPERIMENTS[name].section(known, Options()).text
    costs = "3 | 1 → 1.3 | 50 | 1,500 | 16,000 |"
    assert f"| PiSSA | 5e-4 | **0.6910 ± 0.0010** | **-0.0100 ± 0.0000** | {costs}" in text["methods"]
    assert f"| LoRA | 2e-3 | 0.7010 ± 0.0010 |  | {costs}" in text["methods"]
    assert "The least loss: PiSSA, apart from each other method" in text["methods"]
    assert "| best: 2e-3, 5e-4 | 0.7010 ± 0.0010 | 0.6910 ± 0.0010 | **-0.0100 ± 0.0000** |" in text["equal-rates"]
    # LoRA's is a parabola, 0.1 x²; this rate is a quarter of its best.
    assert "| 5e-4 | 0.7362 | 0.6900 | -0.0462 |" in text["equal-rates"]
    assert "at equal rates PiSSA is below LoRA at 2 of 3 (5e-4, 1e-3)" in text["equal-rates"]
    # PiSSA falls from 2 to 0.691, LoRA to 0.701, in 40 steps.
    assert f"| PiSSA | {40 * 1.299 / 1.309:.1f} ± 0.0 |" in text["few-steps"]
    assert "| LoRA | 40.0 ± 0.0 |" in text["few-steps"]
    # On prose 3 + half of the loss, after 3.
    assert "| PiSSA | 3.0000 | **0.3458 ± 0.0004** | **0.6915 ± 0.0007** |" in text["forgetting"]


def test_a_loss_that_is_not_reached_is_said_to_be(everything: list[Any]) -> None:
    from bench.experiments.experiment import Options
    from bench.experiments.language import LanguageCell
    from bench.experiments.registry import EXPERIMENTS

    known = _some(everything)
    for seed, end in ((1, 0.71), (2, 0.69)):
        cell = LanguageCell("gsm8k", "dora", 16, 2e-3, seed)
        known.put(cell.kind, record(cell, lambda _, end=end: end))
    cell = LanguageCell("gsm8k", "olora", 16, 2e-4, 1)
    known.put(cell.kind, record(cell, lambda _: math.inf))
    cell = LanguageCell("gsm8k", "olora", 16, 2e-4, 2)
    known.put(cell.kind, record(cell, lambda _: 0.8))
    text = EXPERIMENTS["few-steps"].section(known, Options()).text
    assert f"| DoRA | {40 * (2 - 0.702) / (2 - 0.69):.1f} (1 of 2) |" in text
    assert "| OLoRA | not reached |" in text
    assert "| OLoRA | 2e-4 | diverged | — | 3 |" in EXPERIMENTS["methods"].section(known, Options()).text


def test_a_method_has_one_colour_in_all_pictures() -> None:
    """In those of the command line too. What a legend calls QPiSSA is it at any number of alternations."""
    from bench.experiments.figures import style
    from bench.experiments.methods import METHODS
    from pissa.cli.plot import Curve

    for method in ("lora", "pissa", "qpissa_1", "qpissa_5"):
        name = METHODS[method].label.partition(",")[0]
        assert style(method).color == Curve(name, [], []).style["color"]
    assert style("loftq").color == style("LoftQ, T = 1").color
    assert len({style(method).color for method in ("lora", "pissa", "qpissa_1", "loftq")}) == 4

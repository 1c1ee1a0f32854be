"""bench.pictures: the picture of the losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(path))


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    from bench.pictures import smoothed

    assert smoothed([1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, 11 / 3, 4.5]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    assert smoothed([4.0], 5) == [4.0]


def count(picture: np.ndarray, colour: str, opacity: float = 1.0) -> int:
    """Pixels of a colour laid over white."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    distance = np.abs(picture[..., :3] - (opacity * rgb + 1 - opacity)).max(axis=-1)
    return int((distance < 2 / 255).sum())


def test_every_curve_is_drawn_thick_and_thin_in_its_methods_colour(tmp_path: Path) -> None:
    from bench.pictures import LORA, PISSA, QPISSA, draw_losses

    steps = range(1, 41)
    curves = {
        name: (steps, [1 / step + offset + 0.2 * (step % 2) for step in steps])
        for name, offset in (("LoRA", 0.0), ("QPiSSA (nf4)", 0.5))
    }
    draw_losses(curves, tmp_path / "two.png", "title")
    picture = pixels(tmp_path / "two.png")
    for colour in (LORA, QPISSA):
        assert count(picture, colour) > 500
        assert count(picture, colour, opacity=0.3) > 50
    assert count(picture, PISSA) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["two.png"]


def test_a_run_of_one_step_has_a_visible_point(tmp_path: Path) -> None:
    from bench.pictures import PISSA, draw_losses

    for name, loss in (("point.png", 1.0), ("none.png", float("nan"))):
        draw_losses({"PiSSA": ([1], [loss])}, tmp_path / name, "")
    # Both have the label in that colour; a circle of 6 points at 160 dpi covers about 140 pixels.
    point, none = (count(pixels(tmp_path / name), PISSA) for name in ("point.png", "none.png"))
    assert point - none > 100

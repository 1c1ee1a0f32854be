"""bench.pictures: the picture of what runs have learned."""

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


def count(picture: np.ndarray, colour: str, opacity: float = 1.0) -> int:
    """Pixels of a colour laid over white."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    distance = np.abs(picture[..., :3] - (opacity * rgb + 1 - opacity)).max(axis=-1)
    return int((distance < 2 / 255).sum())


def test_losses_and_scores_are_drawn_in_their_methods_colour(tmp_path: Path) -> None:
    from bench.pictures import LORA, PISSA, QPISSA, draw_learning

    steps = range(1, 41)
    runs = {
        method: {
            "losses": [(step, 1 / step + offset + 0.2 * (step % 2)) for step in steps],
            "held_out": [(0, 2.0), (40, offset)],
        }
        for method, offset in (("LoRA", 0.1), ("QPiSSA", 0.5))
    }

    def drawn(lora: int) -> np.ndarray:
        path = tmp_path / f"{lora}.png"
        draw_learning(runs, {"before": 10, "LoRA": lora, "QPiSSA": 80}, 50, 100, path, "title")
        return pixels(path)

    low, high = drawn(20), drawn(60)
    for colour in (LORA, QPISSA):
        assert count(low, colour) > 500
    assert count(low, PISSA) == 0
    # A bar about 110 pixels wide is taller by 40 % of an axis of about 500.
    assert 15_000 < count(high, LORA) - count(low, LORA) < 30_000
    assert count(high, QPISSA) == count(low, QPISSA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20.png", "60.png"]

"""How many lines each room may have. A change that needs more raises its room's budget, and its commit says why.

`make size` prints rooms, files, lines and budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = "python/pissa"
GROUND = f"{PACKAGE}/*.py*"
"""The modules beside the rooms' folders."""

# A room's lines after the last cut, and 5% more. Calibration, with error feedback and two formats, is 560 of them in
# cpp, 150 in ops, 330 in model, and 700 of tests; the repair of a model that bitsandbytes has quantised
# is 150 in model and 40 in integrations. The formats of released models are 680 in cpp, 110 in ops, 260 in base (their
# layouts), 230 in files (which tensors make which layer; a checkpoint read as the dense one), 450 in bench, 1,000 of
# tests, and 90 in checkpoints (a merge into the same format). What a training step takes, in seconds, is 110 there.
# The loss without logits is 290 in cpp, 140 in ops, 230 in training, 580 of tests; attention and norms
# 530, 190, 160, 590. Experts multiplied at once are 430, 170, 100 in layers, and 590. Wide blocks and the early start
# of few-row kernels are 75 in cpp, 165 of tests. The output layer's weight read once is 200 in cpp, tokens without a
# gradient are 100, codes transposed before they are decoded 100; together 80 of tests. malloc's limits are 30 in cli,
# 55 of tests. Heads of queries as tasks of attention's backward are 30 in cpp.
BUDGETS = {
    GROUND: 1_060,
    f"{PACKAGE}/ops": 2_550,
    f"{PACKAGE}/base": 2_260,
    f"{PACKAGE}/layers": 1_310,
    f"{PACKAGE}/model": 2_350,
    f"{PACKAGE}/containers": 1_250,
    f"{PACKAGE}/adapters": 1_750,
    f"{PACKAGE}/conversion": 660,
    f"{PACKAGE}/checkpoints": 2_920,
    f"{PACKAGE}/integrations": 890,
    f"{PACKAGE}/training": 800,
    f"{PACKAGE}/cli": 2_440,
    "cpp/pissa": 13_180,
    "bench": 13_520,
    "tests": 45_285,
}
TEXT = {".py", ".pyi", ".h", ".cc", ".cu", ".txt", ".sh", ".md", ".json", ".jsonl", ".yaml", ".ini"}


def files_of(room: str) -> list[Path]:
    found = ROOT.glob(room) if "*" in room else (ROOT / room).rglob("*")
    return [path for path in found if path.suffix in TEXT and "__pycache__" not in path.parts and path.is_file()]


def lines_of(room: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in files_of(room))


@pytest.mark.parametrize("room", BUDGETS)
def test_no_room_is_above_its_budget(room: str) -> None:
    assert lines_of(room) <= BUDGETS[room], "make size; is there a second way to do something, that could go instead?"


def test_every_room_has_a_budget() -> None:
    rooms = {f"{PACKAGE}/{path.parent.name}" for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert rooms | {GROUND, "cpp/pissa", "bench", "tests"} == BUDGETS.keys()


if __name__ == "__main__":
    print(f"{'room':28}{'files':>6}{'lines':>8}{'budget':>8}")
    for room in BUDGETS:
        print(f"{room:28}{len(files_of(room)):6}{lines_of(room):8}{BUDGETS[room]:8}")

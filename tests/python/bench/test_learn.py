"""bench.learn: one training, measured as it says, in a line of JSON; and the starts that it compares."""

from __future__ import annotations

import json
from argparse import Namespace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny_model import save_tiny_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", max_position_embeddings=256)


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """Problems whose answers end with a number, which is in the question."""
    for part, numbers in (("train", range(40)), ("test", range(40, 52))):
        rows = [{"question": f"{number}?", "answer": f"so\n#### {number}"} for number in numbers]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_run_is_one_line_and_is_not_run_again(
    model: Path, gsm8k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.learn import main

    out = tmp_path / "learn.jsonl"
    given = ["--model", str(model), "--data", str(gsm8k), "--task", "gsm8k", "--out", str(out)]
    given += ["--method", "orthonormal", "--rank", "4", "--steps", "20", "--answers", "2"]
    main([*given, "--rate", "1e-2", "--base", "nf4"])
    main([*given, "--rate", "1e-2", "--base", "nf4"])
    assert "known already" in capsys.readouterr().out
    [line] = map(json.loads, out.read_text().splitlines())
    cell = {"method": "orthonormal", "model": "model", "rate": 1e-2, "seed": 0, "base": "nf4", "steps": 20}
    assert line["cell"].items() >= cell.items()
    result = line["result"]
    assert result["loss"] < result["before"] - 0.2
    assert 0 <= result["right"] <= 1
    assert line["machine"]["model name"]
    assert line["packages"]["torch"] == version("torch")
    main([*given, "--rate", "1e-2", "--seed", "1"])
    assert [json.loads(text)["cell"]["seed"] for text in out.read_text().splitlines()] == [0, 1]


def test_a_seed_draws_the_same_examples_for_all_methods(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import learn

    def drawn(seed: int, rate: float) -> list[Any]:
        seen: list[Any] = []

        def record(model: Any, rows: Any) -> Any:
            seen.extend(rows)
            return model.weight.sum(), 1

        monkeypatch.setattr(learn, "loss", record)
        learn.train(nn.Linear(2, 2), list(range(30)), Namespace(task="gsm8k", seed=seed, steps=10, rate=rate))
        return seen

    assert drawn(0, 1e-2) == drawn(0, 1e-4)
    assert drawn(0, 1e-2) != drawn(1, 1e-2)
    assert sorted(drawn(0, 1e-2)[:30]) == list(range(30))


def test_the_held_out_loss_is_a_mean_over_the_answers_tokens(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from bench.learn import held_out_loss

    dense = AutoModelForCausalLM.from_pretrained(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows, sums = [], torch.zeros(2)
    for length in range(4, 20):  # so that batches are padded
        ids = torch.randint(200, (length,), generator=generator)
        logits = dense(input_ids=ids[None]).logits[0, 2:-1]
        sums += torch.tensor([nn.functional.cross_entropy(logits, ids[3:], reduction="sum"), length - 3])
        rows.append({"input_ids": ids.tolist(), "labels": [-100] * 3 + ids[3:].tolist()})
    assert held_out_loss(dense, rows) == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)


def test_an_answer_is_right_by_its_last_number(model: Path) -> None:
    from transformers import AutoTokenizer

    from bench.learn import share_right

    tokenizer = AutoTokenizer.from_pretrained(model)
    said = {"2 + 2 = 4": "4", "1,204": "#### 1204", "4 or 5": "4", "3 - 1 = 2": "2", "-3": "3", "none": "0"}

    class Says(nn.Module):
        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            answer = list(said)[int(input_ids[0, 0])]
            return torch.cat([input_ids, torch.tensor([tokenizer(answer)["input_ids"]])], 1)

    rows = []
    for place, answer in enumerate(said.values()):
        ids = tokenizer(answer)["input_ids"]
        rows.append({"input_ids": [place, *ids], "labels": [-100, *ids]})
    assert share_right(Says(), tokenizer, rows, 8) == 3 / 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rate", "0"], "a learning rate is above 0"),
        (["--rate", "nan"], "a learning rate is above 0"),
        (["--steps", "2"], "--steps 2: at least 3"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--set", "quant_iters"], "needs FIELD=VALUE"),
        (["--set", "quant_iters=0"], "--set: "),
        (["--set", "no_field=1"], "--set: "),
        (["--base", "nf5"], "invalid choice"),
        (["--task", "gsm8k"], "needs --data: the folder with GSM8K's"),
        (["--task", "reviews"], "needs --data: the folder with movieReviewSnippets"),
        (["--precision", "int8", "--task", "gsm8k", "--data", "GSM8K"], "precision: got 'int8', which multiplies with"),
        (["--model", "/no/model", "--task", "gsm8k", "--data", "GSM8K"], "nothing was measured: "),
        (["--answers", "13", "--task", "gsm8k", "--data", "GSM8K"], "holds out 12 problems; ask fewer"),
    ],
)
def test_bad_values_are_refused_and_nothing_is_written(
    given: list[str], message: str, model: Path, gsm8k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.learn import main

    out = tmp_path / "learn.jsonl"
    given = [str(gsm8k) if text == "GSM8K" else text for text in given]
    with pytest.raises(SystemExit) as stopped:
        main(["--method", "pissa", "--rate", "1e-3", "--model", str(model), "--out", str(out), *given])
    assert message in capsys.readouterr().err + str(stopped.value)
    assert not out.exists()


def test_examples_that_are_all_too_long_are_refused(
    model: Path, gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import learn

    monkeypatch.setitem(learn.TASKS, "gsm8k", learn.TASKS["gsm8k"]._replace(longest=12))
    given = ["--method", "pissa", "--rate", "1e-3", "--model", str(model), "--out", str(tmp_path / "learn.jsonl")]
    with pytest.raises(SystemExit, match="no example of the task gsm8k has at most 12 tokens"):
        learn.main([*given, "--task", "gsm8k", "--data", str(gsm8k)])


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="the package reasoning-gym is not installed")
def test_sums_are_held_out_once_each() -> None:
    from bench.learn import TASKS

    train, held_out = TASKS["sums"].chats(None)
    questions = [chat.messages[0]["content"] for chat in (*train, *held_out)]
    assert len(held_out) == 200
    assert len(set(questions)) == len(questions) > 1000


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_starts_are_the_minor_components_and_directions_of_length_1(scaling: float) -> None:
    import bench.starts  # noqa: F401
    import pissa
    from pissa.layers.layer import pissa_layers

    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    found = {}
    for name in ("minor", "orthonormal", "pissa"):
        layer = nn.Linear(8, 12, bias=False)
        layer.weight.data.copy_(weight)
        model = nn.Sequential(layer)
        pissa.wrap(model, r=3, lora_alpha=int(3 * scaling), init=name, target_modules=["0"])
        start = next(iter(pissa_layers(model).values())).start_of("default")
        found[name] = (start.a0, start.b0)
    a, b = found["minor"]
    torch.testing.assert_close(scaling * b @ a, (u[:, -3:] * s[-3:]) @ vh[-3:])
    a, b = found["orthonormal"]
    torch.testing.assert_close(a @ a.mT, torch.eye(3))
    torch.testing.assert_close(b.mT @ b, torch.eye(3))
    torch.testing.assert_close(a, nn.functional.normalize(found["pissa"][0]))

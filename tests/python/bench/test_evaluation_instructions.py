"""bench.experiments.data.instructions: the formats of the paper's training data, and what TRL makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_model import save_tiny_model
from trainers import quiet

ROOT = Path(__file__).parents[3]

pytestmark = quiet


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


METAMATH = [
    {
        "query": f"What is {i} + {{1}}?",
        "response": f"It is {i + 1}.\nThe answer is: {i + 1}",
        "type": "GSM_Rephrased",
        "original_question": "?",
    }
    for i in range(5)
]
CODE = [{"query": "Say \u2028 it", "answer": "```python\nprint()\n```", "resource": "evolinstruct", "lang": "python"}]
EVOL = [
    {
        "idx": "AtTxJlh",
        "conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}],
    }
]


def prompt(instruction: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:"
    )


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(file)


def test_published_formats(tmp_path: Path) -> None:
    from bench.experiments.data.instructions import load

    cache = tmp_path / "cache"
    file = tmp_path / "MetaMathQA-395K.json"
    file.write_text(json.dumps(METAMATH, indent=1))
    assert load("metamath", str(file), rows=2, cache=cache).to_list() == [
        {"prompt": prompt("What is 0 + {1}?"), "completion": "It is 1.\nThe answer is: 1\n"},
        {"prompt": prompt("What is 1 + {1}?"), "completion": "It is 2.\nThe answer is: 2\n"},
    ]
    assert len(load("metamath", str(file), rows=100_000, cache=cache)) == 5
    code = lines(tmp_path / "CodeFeedback-Filtered-Instruction.jsonl", CODE)
    assert load("codefeedback", code, cache=cache)[:] == {
        "prompt": [prompt("Say \u2028 it")],
        "completion": ["```python\nprint()\n```\n"],
    }
    lines(tmp_path / "evol" / "train.jsonl", EVOL)
    assert load("evol-instruct", str(tmp_path / "evol"), cache=cache)[:] == {
        "prompt": [prompt("Name a colour.")],
        "completion": ["Red.\n"],
    }


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    from bench.experiments.data.instructions import load

    cache = tmp_path / "cache"
    file = lines(tmp_path / "data.jsonl", CODE)
    with pytest.raises(ValueError, match="format is 'alpaca'; allowed: metamath, codefeedback, evol-instruct"):
        load("alpaca", file)
    with pytest.raises(ValueError, match="rows is 0; allowed"):
        load("codefeedback", file, rows=0)
    with pytest.raises(ValueError, match=r"has no response, which metamath has; found .*'query', 'answer'"):
        load("metamath", file, cache=cache)
    swapped = [{"conversations": EVOL[0]["conversations"][::-1]}]
    with pytest.raises(ValueError, match="begins with gpt, human; needed: human, gpt"):
        load("evol-instruct", lines(tmp_path / "swapped.jsonl", swapped), cache=cache)


def test_trl_has_the_loss_on_responses_only(tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from bench.experiments.data.instructions import load

    folder = save_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    data = load("codefeedback", lines(tmp_path / "data.jsonl", CODE), cache=tmp_path / "cache")
    config = SFTConfig(str(tmp_path), max_length=512, use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(str(folder), config, train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(batch["input_ids"][0]) == prompt("Say \u2028 it") + "```python\nprint()\n```\n</s>"
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels >= 0]) == "```python\nprint()\n```\n</s>"

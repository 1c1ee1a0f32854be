"""bench/recipes: what its README.md tells the owner of a GPU to run is read as it is meant."""

from __future__ import annotations

import json
import runpy
from argparse import Namespace
from pathlib import Path

import pytest

from pissa.cli.data import read_chats
from pissa.cli.options import adapter_config, parse
from pissa.cli.sources import records

RECIPES = Path(__file__).parents[3] / "bench" / "recipes"


@pytest.mark.parametrize(("name", "base"), [("table_2", (None, 1)), ("table_2_4bit", ("nf4", 5))])
def test_finetune_takes_the_papers_options(name: str, base: tuple[str | None, int | None]) -> None:
    flags = ["--data", "metamath.jsonl", "--lr", "1e-4", "--bf16", "false"]  # bfloat16 needs a machine that has it
    ours, training = parse(Namespace(config=str(RECIPES / f"{name}.yaml"), argv=flags), "SFT")
    config = adapter_config(ours, training.seed)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (128, 128, 0, "all-linear")
    assert (ours.quant, ours.quant_iters, ours.dataset_name) == (*base, "metamath.jsonl")
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
    assert (training.learning_rate, training.warmup_steps, training.num_train_epochs) == (1e-4, 0.03, 1)  # the flag's


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("metamath", {"query": "1+1?", "response": "2", "type": "GSM_Rephrased"}),
        ("codefeedback", {"query": "1+1?", "answer": "2", "lang": "python"}),
        ("evol-instruct", {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}),
    ],
)
def test_data_become_what_finetune_reads(
    name: str, row: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.json").write_text(json.dumps([row] * 5))
    main = runpy.run_path(str(RECIPES / "data.py"))["main"]
    main([name, str(tmp_path / "out.jsonl"), "--rows", "3", "--source", str(tmp_path / "data.json")])
    chats = read_chats(records(str(tmp_path / "out.jsonl")))
    assert [[message["content"] for message in chat.messages] for chat in chats] == [["1+1?", "2"]] * 3

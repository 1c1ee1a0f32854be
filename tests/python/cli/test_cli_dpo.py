"""`pissa dpo` on a small random model, and what it shares with `pissa finetune`: data sets, --lr auto."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from datasets import Dataset

import pissa
import runs
from daily import each
from pissa.cli import main
from runs import cut_last_step, exact, logged, refused, same_weights, save_preferences, save_sums

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_preferences(tmp_path_factory.mktemp("data"))


def command(base: Path, data: Path, out: Path, *more: str, name: str = "dpo", steps: int = 4) -> list[str]:
    return runs.command(name, base, data, out, "--rank", "4", *more, steps=steps)


OPTIONS = [["--quant", "nf4"], [], ["--quant", "int8", "--dtype", "bfloat16"]]


@pytest.mark.parametrize("options", each(OPTIONS, OPTIONS[:1]))
def test_preferences_are_learned_from_ln_2_on(
    options: list[str], base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(command(base, data, out, *options, "--eval-data", str(data), steps=3)) == 0
    first, _, last = logged(out)
    assert first == pytest.approx(math.log(2), abs=1e-6 if not options else 1e-2)
    assert last < first
    assert not (out / "ref").exists()  # TRL's copy of the adapter as it was
    message = refused(command(out, data, tmp_path / "new"), capsys)  # which does not take the run for one of finetune
    assert f"`pissa dpo --config {out / 'run.yaml'} --resume`" in message


def test_an_interrupted_run_of_every_option_goes_on_bit_for_bit(base: Path, data: Path, tmp_path: Path) -> None:
    """Every field of the configuration is an option, and so are those of the model's class: run.yaml has them."""
    patterns = ["--rank_pattern", '{"v_proj": 2}', "--alpha_pattern", '{"v_proj": 8}']
    options = ["--target-modules", "q_proj", "v_proj", *patterns, "--use_dora", "--use_rslora", "--init", "pissa"]
    options += ["--model_init_kwargs", '{"attn_implementation": "eager"}']
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(base, data, whole, *options)) == 0
    config = pissa.PissaConfig.from_pretrained(whole)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert (config.rank_pattern, config.alpha_pattern) == ({"v_proj": 2}, {"v_proj": 8})
    assert (config.use_dora, config.use_rslora, config.init) == (True, True, "pissa")
    recorded = yaml.safe_load((whole / "run.yaml").read_text())
    assert recorded["target_modules"] == ["q_proj", "v_proj"]
    assert recorded["rank_pattern"] == {"v_proj": 2}
    assert recorded["model_init_kwargs"] == {"attn_implementation": "eager"}

    shutil.copytree(whole, cut)
    cut_last_step(cut)
    assert main(["dpo", f"--config={whole / 'run.yaml'}", "--out", str(cut), "--resume"]) == 0
    assert exact(cut) == exact(whole)
    assert same_weights(cut, whole)
    assert main(command(base, data, cut, *options, "--resume")) == 0  # there is nothing left to do
    assert exact(cut) == exact(whole)


def test_a_tokenizer_without_a_template_has_the_alpaca_prompt(base: Path, data: Path) -> None:
    from transformers import AutoTokenizer

    from pissa.cli.sources import records
    from pissa.cli.templates import prompt_text
    from pissa.cli.training import DPO

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, _ = DPO.rows(records(str(data)), tokenizer, 100)
    assert rows[0]["prompt"] == [{"role": "user", "content": "0+1"}]
    tokenizer.chat_template = None
    assert DPO.rows(records(str(data)), tokenizer, 100)[0] == rows
    assert prompt_text(rows[0]["prompt"], tokenizer).endswith("### Instruction:\n0+1\n\n### Response:")


# ---- What both commands share ----


def test_a_data_set_of_trl_is_taken_as_it_is(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{i}+1", "completion": f"={i + 1}"} for i in range(16)]
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        Dataset.from_list(rows).to_parquet(tmp_path / "set" / f"{split}.parquet")
    options = ["--eval_strategy", "steps", "--eval_steps", "2", "--packing", "--max-length", "32"]
    assert main(command(base, tmp_path / "set", tmp_path / "run", *options, name="finetune", steps=3)) == 0
    assert logged(tmp_path / "run")[-1] < logged(tmp_path / "run")[0]
    assert "held out  loss" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(command(base, tmp_path / "empty", tmp_path / "other", name="finetune")) == 2
    assert "cannot be loaded as a data set" in capsys.readouterr().err


class Suggestion(NamedTuple):
    rate: float
    text: str


@pytest.mark.parametrize("name", each(["finetune", "dpo"], ["dpo"]))
def test_the_rate_is_found_and_recorded(
    name: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def suggest_lr(model: Any, batches: list[Any], loss: Any) -> Suggestion:
        assert len(batches) == (6 if name == "finetune" else 4)
        value = model(**batches[0]).loss if loss is None else loss(model, batches[0])
        assert torch.isfinite(value)
        return Suggestion(3e-3, "the best of two")

    data = save_sums(tmp_path) if name == "finetune" else data
    monkeypatch.setattr(pissa, "suggest_lr", suggest_lr, raising=False)
    out = tmp_path / "run"
    assert main(command(base, data, out, "--lr", "auto", name=name)) == 0
    assert "rate      the best of two" in capsys.readouterr().out
    assert yaml.safe_load((out / "run.yaml").read_text())["learning_rate"] == 3e-3
    assert logged(out, "learning_rate")[1] == 3e-3
    monkeypatch.delattr(pissa, "suggest_lr")
    assert main(command(base, data, out, "--lr", "auto", "--resume", name=name)) == 0

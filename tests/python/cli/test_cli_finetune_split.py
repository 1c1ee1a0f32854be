"""`pissa finetune` on a folder that `pissa init` has written, and with gradient checkpointing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.models.llama.modeling_llama import LlamaMLP

import pissa
from pissa.checkpoints.init import init
from pissa.cli import main
from tiny_model import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def split(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "split"
    init(base, folder, pissa.PissaConfig(r=4, quant="nf4"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1", "answer": f"{i + 1}"}) + "\n" for i in range(24)))
    return path


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    fixed = ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--steps", "4"]
    return [*fixed, "--batch-size", "4", "--grad-accum", "1", "--lr", "1e-2", "--save-steps", "2", *more]


def rows(out: Path) -> list[dict[str, Any]]:
    exact = ("step", "loss", "learning_rate")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [{key: row[key] for key in exact} for row in history if "loss" in row]


WEIGHTS = "adapter_model.safetensors"


def test_it_is_the_run_of_the_dense_model(
    base: Path, split: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(command(split, data, tmp_path / "split")) == 0
    said = capfd.readouterr()
    assert "QPiSSA (nf4), rank 4" in said.out
    assert "PiSSA init" not in said.err
    assert "Warning" not in said.err
    assert main(command(base, data, tmp_path / "dense", "--rank", "4", "--quant", "nf4")) == 0
    assert rows(tmp_path / "split") == rows(tmp_path / "dense")
    for name in (WEIGHTS, "pissa.safetensors", "adapter_config.json"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    run, dense = (yaml.safe_load((tmp_path / name / "run.yaml").read_text()) for name in ("split", "dense"))
    assert (run["quant"], run["r"], run["svd"], run["dtype"]) == ("nf4", 4, "krylov", "float32")
    assert {name for name in run if run[name] != dense[name]} <= {"model_name_or_path", "output_dir", "target_modules"}
    assert f'pissa.load("{split}", adapter="{tmp_path / "split"}") has it exactly' in said.out


def test_it_is_resumed(split: Path, data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(split, data, whole)) == 0
    shutil.copytree(whole, cut)
    for path in (cut / WEIGHTS, cut / "trainer_state.json", cut / "checkpoint-4" / "trainer_state.json"):
        path.unlink()
    assert main(command(split, data, cut, "--resume")) == 0
    assert rows(cut) == rows(whole)
    assert (cut / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_gradient_checkpointing_changes_no_bit(
    split: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(self) or forward(self, x))
    assert main(command(split, data, tmp_path / "kept")) == 0
    once = len(calls)
    assert main(command(split, data, tmp_path / "computed again", "--gradient-checkpointing")) == 0
    assert len(calls) == 2 * once + 2 * 4  # two layers in four steps are computed again
    assert rows(tmp_path / "computed again") == rows(tmp_path / "kept")
    assert (tmp_path / "computed again" / WEIGHTS).read_bytes() == (tmp_path / "kept" / WEIGHTS).read_bytes()


def test_alternations_are_those_of_the_folder(base: Path, data: Path, tmp_path: Path) -> None:
    init(base, tmp_path / "model", pissa.PissaConfig(r=4, quant="nf4", quant_iters=2))
    assert main(command(tmp_path / "model", data, tmp_path / "split")) == 0
    options = ["--quant", "nf4", "--rank", "4"]
    assert main(command(base, data, tmp_path / "dense", *options, "--quant-iters", "2")) == 0
    assert rows(tmp_path / "split") == rows(tmp_path / "dense")
    assert main(command(base, data, tmp_path / "once", *options)) == 0
    assert rows(tmp_path / "split") != rows(tmp_path / "once")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "8"], "--rank 8: {model} was split with --rank 4; leave --rank out"),
        (["--quant", "int8"], "--quant int8: {model} was split with --quant nf4; leave --quant out"),
        (["--quant-iters", "3"], "--quant-iters 3: {model} was split with --quant-iters 1; leave --quant-iters out"),
        (["--svd", "exact"], "--svd exact: {model} was split with --svd krylov; leave --svd out"),
        (["--method", "lora"], "--method lora: {model} holds residuals"),
    ],
)
def test_what_the_folder_has_settled_is_not_asked_for(
    options: list[str], words: str, split: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(command(split, data, tmp_path / "run", *options)) == 2
    assert words.format(model=split) in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_it_has_settled_may_be_said(split: Path, data: Path, tmp_path: Path) -> None:
    assert main(command(split, data, tmp_path / "run", "--rank", "4", "--quant", "nf4", "--steps", "1")) == 0


def test_a_damaged_folder_is_named(split: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(split, tmp_path / "folder"))
    (folder / "pissa_init" / WEIGHTS).unlink()
    assert main(command(folder, data, tmp_path / "run")) == 2
    assert f"{WEIGHTS} is missing" in capfd.readouterr().err

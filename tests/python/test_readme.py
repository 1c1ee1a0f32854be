"""The README's Python examples run as they stand; only the name of the model is replaced by a folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pissa import PissaModel, ops
from tiny_model import save_tiny_model

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_trains_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert name in EXAMPLES[0]
    exec(EXAMPLES[0].replace(name, str(save_tiny_model(tmp_path / "model"))), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(PissaModel.from_pretrained(base, tmp_path / "adapter"), PissaModel)


def test_the_ops_example_runs() -> None:
    weight, x = torch.randn(48, 64), torch.randn(5, 64)
    factors = {"a": torch.randn(16, 64), "b": torch.randn(48, 16), "da": torch.zeros(16, 64), "db": torch.zeros(48, 16)}
    names = {"weight": weight, "x": x, "base": torch.nn.Linear(64, 48), **factors}
    exec(EXAMPLES[1], names)
    assert names["y"].shape == (5, 48)
    assert torch.equal(names["y"], names["base"](x))
    assert names["w"].shape == weight.shape
    assert isinstance(names["q"], ops.Nf4Weight)

"""The README's Python examples run as they stand; only the name of the model is replaced by a folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import pissa
from language_models import Make
from pissa import PissaModel, ops
from tiny_model import save_tiny_model

README = (Path(__file__).parents[3] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def example(text: str) -> str:
    """The one that holds the text."""
    (found,) = (code for code in EXAMPLES if text in code)
    return found


def test_the_example_trains_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    exec(example(name).replace(name, str(save_tiny_model(tmp_path / "model"))), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(PissaModel.from_pretrained(base, tmp_path / "adapter"), PissaModel)


@pytest.mark.parametrize("line", example("use_dora=True").splitlines())
def test_each_variant_runs(line: str, tiny_llama: Make, tokens: torch.Tensor) -> None:
    model = tiny_llama()
    if "optimizer" in line:
        model = pissa.wrap(model, r=16)
    names = {"create_loraplus_optimizer": create_loraplus_optimizer, "pissa": pissa, "torch": torch, "model": model}
    made = eval(line, names)
    if "optimizer" in line:
        assert sorted({group["lr"] for group in made.param_groups if group["params"]}) == [2e-4, 16 * 2e-4]
    else:
        assert torch.isfinite(made(input_ids=tokens, labels=tokens).loss)


def test_the_ops_example_runs() -> None:
    weight, x = torch.randn(48, 64), torch.randn(5, 64)
    factors = {"a": torch.randn(16, 64), "b": torch.randn(48, 16), "da": torch.zeros(16, 64), "db": torch.zeros(48, 16)}
    names = {"weight": weight, "x": x, "base": torch.nn.Linear(64, 48), **factors}
    exec(example("from pissa import ops"), names)
    assert names["y"].shape == (5, 48)
    assert torch.equal(names["y"], names["base"](x))
    assert names["w"].shape == weight.shape
    assert isinstance(names["q"], ops.QuantizedWeight)

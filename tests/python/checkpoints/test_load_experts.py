"""pissa.load of a mixture of experts that `pissa init` has split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mixtures
import pissa
from language_models import assert_equal, logits, train
from pissa.base.stored import QuantizedLinear, ResidualLinear
from pissa.checkpoints.init import init
from pissa.layers.layer import pissa_layers

R = mixtures.R
kinds = pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])  # tensors of each expert, transposed stacks
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")  # Llama 4's router


def saved(kind: str, folder: Path) -> Path:
    mixtures.make(kind, torch.bfloat16).save_pretrained(folder)
    return folder


def wrapped(source: Path, **fields: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source)
    return pissa.wrap(model, r=R, task_type="CAUSAL_LM", **fields)


def assert_alike(model: Any, expected: Any, tokens: Tensor) -> None:
    assert_equal(model.state_dict(), expected.state_dict())
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
    assert train(model, tokens) == train(expected, tokens)


@kinds
@pytest.mark.parametrize("fields", [{"quant": "nf4"}, {"quant": "int8"}, {"residual": "explicit"}], ids=str)
def test_they_are_what_wrap_makes_of_the_dense_model(
    kind: str, fields: dict[str, str], tokens: Tensor, tmp_path: Path
) -> None:
    source = saved(kind, tmp_path / "source")
    init(source, tmp_path / "split", pissa.PissaConfig(r=R, **fields), experts=fields.get("quant", "dense"))
    assert_alike(pissa.load(tmp_path / "split"), wrapped(source, **fields), tokens)


@kinds
def test_dense_residuals_beside_codes(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "source")
    init(source, tmp_path / "split", pissa.PissaConfig(r=R, quant="nf4"))
    model = pissa.load(tmp_path / "split")
    layers = pissa_layers(model.base_model.model)
    explicit, quantised = (
        pissa_layers(wrapped(source, **fields).base_model.model)
        for fields in ({"residual": "explicit"}, {"quant": "nf4"})
    )
    for name, layer in layers.items():
        base = layer.base_layer
        assert isinstance(base, ResidualLinear if ".experts." in name else QuantizedLinear)
        assert torch.equal(base.matrix(), (explicit if ".experts." in name else quantised)[name].base.matrix())
    losses = train(model, tokens)
    assert losses[-1] < losses[0]
    model.warned_of_plain_lora = True
    model.save_pretrained(tmp_path / "run")
    again = pissa.load(tmp_path / "split", adapter=tmp_path / "run")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_plain_transformers_says_who_reads_experts_in_4_bits(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path / "source")
    init(source, tmp_path / "split", pissa.PissaConfig(r=R, quant="nf4"), experts="nf4")
    config = json.loads((tmp_path / "split" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "pissa"
    assert pissa.load  # its import tells transformers of the method; without, transformers misses the weights
    with pytest.raises(ValueError, match=r"are quantised, which pissa\.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "split")

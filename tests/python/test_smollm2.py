"""A real model, SmolLM2-135M-Instruct: before training, the wrapped model is the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pissa
from pissa.cli.sources import unpack_smollm2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    unpack_smollm2(folder)
    return folder


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tensor:
    from transformers import AutoTokenizer

    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_bit_for_bit(dtype: torch.dtype, folder: Path, tokens: Tensor) -> None:
    base = logits(load(folder, dtype), tokens)
    model = pissa.wrap(load(folder, dtype), r=16, task_type="CAUSAL_LM").eval()
    assert torch.equal(logits(model, tokens), base)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)


def test_the_4_bit_error_is_smaller_than_that_of_quantising_the_weights(folder: Path, tokens: Tensor) -> None:
    """The residual is easier to quantise than the weight: QPiSSA starts closer to the base than NF4 alone."""
    base = logits(load(folder, torch.float32), tokens)
    qpissa = pissa.wrap(load(folder, torch.float32), r=16, quant="nf4", task_type="CAUSAL_LM").eval()
    assert torch.equal(logits(qpissa, tokens), logits_disabled(qpissa, tokens))
    plain = load(folder, torch.float32)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = pissa.ops.nf4_dequantize(pissa.ops.nf4_quantize(module.weight))
    assert (logits(qpissa, tokens) - base).norm() < (logits(plain, tokens) - base).norm()


def logits_disabled(model: pissa.PissaModel, tokens: Tensor) -> Tensor:
    with model.disable_adapter():
        return logits(model, tokens)

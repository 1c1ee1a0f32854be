"""Training through the rounding of a merge: the trained model is the merged one, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gguf_fixtures
import pissa
from language_models import Make, logits, train
from pissa import ops
from pissa.checkpoints.merge import merge
from pissa.layers.layer import pissa_layers
from released_folders import FIELDS, released

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
AWARE: dict[str, Any] = {**FIELDS, "merge_aware": True, "dtype": torch.float32}


def base(kind: str, folder: Path) -> Path:
    if kind == "gguf":
        gguf_fixtures.write(gguf_fixtures.make("llama"), "llama", folder / "base.gguf", gguf_fixtures.mixed)
        return folder / "base.gguf"
    released("qwen3_moe" if kind == "experts" else "llama", "fp8-tiles" if kind == "experts" else kind, folder / "base")
    return folder / "base"


@pytest.mark.parametrize("kind", ["mxfp4-compressed", "experts"])
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_the_merged_model_is_the_trained_one(kind: str, init: str, tokens: Tensor, tmp_path: Path) -> None:
    path = base(kind, tmp_path)
    model = pissa.load(path, init=init, **AWARE)
    with model.disable_adapter():
        start = logits(model, tokens)
    assert torch.equal(logits(model, tokens), start)
    losses = train(model, tokens, steps=6)
    assert losses[-1] < losses[0]
    trained = logits(model.eval(), tokens)
    assert not torch.equal(trained, start)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), start)
    model.save_pretrained(tmp_path / "run")
    again = pissa.load(path, adapter=tmp_path / "run", dtype=torch.float32)
    assert torch.equal(logits(again, tokens), trained)
    merge(tmp_path / "run", path, tmp_path / "merged", quant="same")
    merged = pissa.load(tmp_path / "merged", init="lora", dtype=torch.float32, **FIELDS)
    with merged.disable_adapter():
        assert torch.equal(logits(merged, tokens), trained)
    dense = logits(copy.deepcopy(model).merge_and_unload(), tokens)
    assert (dense - trained).norm() <= 2e-5 * trained.norm()


def test_of_a_gguf_file(tokens: Tensor, tmp_path: Path) -> None:
    path = base("gguf", tmp_path)
    model = pissa.load(path, init="lora", **{**AWARE, "target_modules": ["q_proj", "up_proj", "down_proj"]})
    train(model, tokens, steps=4)
    trained = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path / "run")
    pissa.export(tmp_path / "run", tmp_path / "merged.gguf", "gguf-model")
    merged = pissa.load(tmp_path / "merged.gguf", init="lora", dtype=torch.float32, **FIELDS)
    with merged.disable_adapter():
        assert torch.equal(logits(merged, tokens), trained)


def test_gradients_are_those_of_the_change() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy, a, b = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 64), (2, 5, 32), (3, 64), (32, 3)))
    codes = ops.quantize(torch.randn(32, 64, generator=generator), "mxfp4")
    leaves = [leaf.requires_grad_() for leaf in (x, a, b)]
    y = ops.linear_through(x, codes, None, a, b, 0.5)
    assert torch.equal(y, ops.linear(x.detach(), codes))
    y.backward(dy)
    dense = ops.dequantize(codes).double()
    x64, a64, b64 = (leaf.detach().double().requires_grad_() for leaf in leaves)
    (0.5 * x64 @ a64.mT @ b64.mT).backward(dy.double())
    for leaf, expected in ((a, a64), (b, b64)):
        torch.testing.assert_close(leaf.grad, expected.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, (dy.double() @ dense).float(), rtol=1e-5, atol=1e-5)


def test_rows_with_adapters_of_their_own(tokens: Tensor, tmp_path: Path) -> None:
    path = base("mxfp4-compressed", tmp_path)
    model = pissa.load(path, init="lora", **AWARE)
    train(model, tokens, steps=3)
    model.eval()
    both = logits(model, tokens)
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["default", *["__base__"] * (len(tokens) - 1)]).logits
    assert (mixed[0] - both[0]).norm() <= 2e-5 * both[0].norm()
    layer = next(iter(pissa_layers(model.base_model.model).values()))
    first = layer.merged_codes("default")
    assert layer.merged_codes("default") is first  # one pass over the codes for a change
    layer.deltas("default").b.data.add_(0.01)  # which torch does not count
    assert layer.merged_codes("default") is not first


def test_a_change_in_16_bits(tokens: Tensor, tmp_path: Path) -> None:
    path = base("mxfp4-compressed", tmp_path)
    model = pissa.load(path, init="lora", **{**AWARE, "dtype": torch.bfloat16})
    losses = train(model, tokens, steps=6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fields", [{"quant": "nf4"}, {"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_it_does_not_go_with(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="merge_aware: got True together with"):
        pissa.PissaConfig(r=2, merge_aware=True, **fields)


def test_a_dense_base_is_refused(tiny_llama: Make) -> None:
    with pytest.raises(ValueError, match=r"merge_aware: got True, and no layer of the model .* in codes"):
        pissa.wrap(tiny_llama(), r=2, merge_aware=True)

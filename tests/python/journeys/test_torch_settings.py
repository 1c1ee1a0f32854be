"""What a script has set of torch when it calls us, or sets between two steps, changes nothing of a training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import gguf_fixtures
import pissa
from language_models import FORMS, Make, logits, moved, train
from released_folders import FIELDS, released

KINDS: dict[str, dict[str, Any]] = {
    **FORMS,
    "lora": {"init": "lora"},
    "QLoRA": {"init": "lora", "quant": "nf4"},
    "LoRA on QPiSSA's base": {"init": "lora", "repair": "pissa", "quant": "nf4"},
    "DoRA": {"use_dora": True},
    "DoRA of a LoRA": {"use_dora": True, "init": "lora", "quant": "nf4"},
    "more than layers": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
}
kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Of torch, in which scripts load a model; back to float32 after the test."""
    yield request.param
    torch.set_default_dtype(torch.float32)


def trained(model: Any, tokens: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """The logits of a model after a few steps, of which the folder has the adapter, and those after a merge."""
    train(model, tokens)
    after = logits(model.eval(), tokens)
    model.warned_of_plain_lora = True
    model.save_pretrained(folder)
    return after, logits(model.merge_and_unload(), tokens)


@kinds
def test_the_default_dtype(
    fields: dict[str, Any], default_dtype: torch.dtype, small_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    expected = trained(pissa.wrap(small_llama(), r=4, **fields), tokens, tmp_path / "float32")
    base, again = small_llama(), small_llama()
    torch.set_default_dtype(default_dtype)
    model = pissa.wrap(base, r=4, **fields)
    found = trained(model, tokens, tmp_path / "run")
    assert all(map(torch.equal, found, expected))
    assert torch.equal(logits(pissa.PissaModel.from_pretrained(again, tmp_path / "run"), tokens), expected[0])
    torch.set_default_dtype(torch.float32)
    restored = pissa.PissaModel.from_pretrained(small_llama(), tmp_path / "run")
    assert torch.equal(logits(restored, tokens), expected[0])
    restored.unload()


def test_a_plain_lora_is_added(default_dtype: torch.dtype, small_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    lora = peft.get_peft_model(small_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    moved(lora).save_pretrained(tmp_path / "lora")
    base = small_llama()
    torch.set_default_dtype(default_dtype)
    model = pissa.wrap(base, r=4)
    model.load_adapter(tmp_path / "lora", "second", is_trainable=True)
    model.set_adapter("second")
    train(model, tokens)
    model.save_pretrained(tmp_path / "run")
    torch.set_default_dtype(torch.float32)
    again = pissa.PissaModel.from_pretrained(small_llama(), tmp_path / "run" / "second")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def assert_evaluation_changes_nothing(first: Any, second: Any, tokens: Tensor) -> None:
    """Of two models that are alike, one is evaluated in inference mode before and between the steps."""
    for _ in range(2):
        with torch.inference_mode():
            second.eval()(input_ids=tokens, labels=tokens)
            second.train()(input_ids=tokens, labels=tokens)
        assert train(second, tokens, 2) == train(first.train(), tokens, 2)


@kinds
def test_evaluation_in_inference_mode(fields: dict[str, Any], small_llama: Make, tokens: Tensor) -> None:
    first, second = (pissa.wrap(small_llama(), r=4, **fields) for _ in range(2))
    assert_evaluation_changes_nothing(first, second, tokens)


@pytest.mark.parametrize("merge_aware", [False, True])
@pytest.mark.parametrize("kind", ["gguf", "fp8-tiles"])
def test_evaluation_of_codes_in_inference_mode(kind: str, merge_aware: bool, tokens: Tensor, tmp_path: Path) -> None:
    path = tmp_path / ("base.gguf" if kind == "gguf" else "base")
    if kind == "gguf":
        gguf_fixtures.write(gguf_fixtures.make("llama"), "llama", path, gguf_fixtures.mixed)
    else:
        released("llama", kind, path)
    fields = {**FIELDS, "init": "lora", "merge_aware": merge_aware}
    assert_evaluation_changes_nothing(*(pissa.load(path, **fields) for _ in range(2)), tokens.clamp(max=90))

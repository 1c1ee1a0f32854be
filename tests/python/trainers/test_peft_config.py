"""TRL's trainers that wrap the model themselves, given `peft_config=PissaConfig(...)`: they train what wrap makes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pissa
from daily import each
from pissa import PissaConfig, PissaModel
from trainers import FORMS, TERMS, assert_equal, forms, logged, quiet, state, trainable, trl_trainer

pytestmark = quiet

Base = Callable[[], nn.Module]


def trainer(method: str, model: nn.Module, folder: Path, tokenizer: Any, **others: Any) -> Any:
    return trl_trainer(method, model, folder, tokenizer, **{"max_steps": 3, "save_strategy": "no"} | others)


def config(**fields: Any) -> PissaConfig:
    return PissaConfig(r=4, task_type="CAUSAL_LM", **fields)


@forms
@pytest.mark.parametrize("method", each(["SFT", "DPO", "KTO", "GRPO", "RLOO"], ["DPO"]))
def test_losses_are_those_of_the_wrapped_model(
    method: str, form: str, base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    """Bit for bit. For a wrapped model TRL keeps a copy of its adapter as the reference, here it switches it off."""
    given = config(**FORMS[form])
    ours = trainer(method, base(), tmp_path / "ours", tokenizer, peft_config=given)
    assert isinstance(ours.model, PissaModel)
    ours.train()
    wrapped = trainer(method, pissa.wrap(base(), given), tmp_path / "wrapped", tokenizer)  # sets the seed again
    wrapped.train()
    assert list(ours.model.peft_config) == ["default"]
    assert len(logged(ours)) == 3
    assert logged(ours) == logged(wrapped)
    assert logged(ours, "grad_norm") == logged(wrapped, "grad_norm")
    after = {name: tensor for name, tensor in state(wrapped.model).items() if ".ref." not in name}
    assert_equal(state(ours.model), after)
    assert trainable(ours.model) == trainable(wrapped.model)
    if method == "DPO":
        assert logged(ours)[0] == torch.tensor(2.0).log().item()
    if method == "KTO":
        assert logged(ours)[0] == 0.5
    if method in ("GRPO", "RLOO"):
        assert logged(ours, "reward") == logged(wrapped, "reward")
        assert logged(ours, "kl")[-1] != 0


def test_a_reference_that_is_computed_before(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    """In batches of other lengths, padded otherwise: equal but for the order of sums."""
    others = {"precompute_ref_log_probs": True, "bf16": False}
    run = trainer("DPO", base(), tmp_path, tokenizer, peft_config=config(quant="nf4"), **others)
    run.train()
    # beta = 0.1, and a log-probability of at most 8 characters is a sum of at most 8 logarithms, each below 8
    assert logged(run)[0] == pytest.approx(math.log(2), abs=0.1 * 4 * 64 * TERMS * 2**-24)
    assert logged(run)[-1] < math.log(2)


def chat_template(tokenizer: Any, folder: Path) -> Path:
    """The folder of a tokenizer with two more tokens, and a template that uses them."""
    tokenizer.add_tokens(["<|turn|>", "<|end|>"])
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_that_the_trainer_adds(
    base: Base, folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL grows the vocabulary and writes `trainable_token_indices` and `modules_to_save` into the configuration."""
    from transformers import AutoTokenizer
    from trl.trainer import sft_trainer

    chat = str(chat_template(tokenizer, tmp_path / "chat"))
    clone = sft_trainer.clone_chat_template

    def seeded(*args: Any) -> Any:
        """New rows are drawn."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return clone(*args)

    monkeypatch.setattr(sft_trainer, "clone_chat_template", seeded)
    given = config(trainable_token_indices={"embed_tokens": [3]}, modules_to_save=["norm"])
    plain = AutoTokenizer.from_pretrained(folder)
    ours = trainer("SFT", base(), tmp_path, plain, peft_config=copy.deepcopy(given), chat_template_path=chat)

    model, again, added = seeded(base(), AutoTokenizer.from_pretrained(folder), chat)
    rows = [3, *added]
    wanted = config(trainable_token_indices={"embed_tokens": rows}, modules_to_save=["norm", "lm_head"])
    wrapped = trainer("SFT", pissa.wrap(model, wanted), tmp_path, again)

    assert ours.model.peft_config["default"].trainable_token_indices == {"embed_tokens": rows}
    assert any("trainable_tokens_delta" in name for name in trainable(ours.model))
    assert any("lm_head.modules_to_save" in name for name in trainable(ours.model))
    assert trainable(ours.model) == trainable(wrapped.model)
    for run in (ours, wrapped):
        run.train()
    assert logged(ours) == logged(wrapped)
    assert_equal(state(ours.model), state(wrapped.model))
    ours.save_model(tmp_path / "end")
    other, _, _ = clone(base(), AutoTokenizer.from_pretrained(folder), chat)  # whose new rows are other ones
    assert_equal(state(PissaModel.from_pretrained(other, tmp_path / "end")), state(ours.model))

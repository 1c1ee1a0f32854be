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
from trainers import FORMS, TERMS, assert_equal, forms, logged, options, quiet, state, trainable

pytestmark = [quiet, pytest.mark.filterwarnings("ignore::pissa.notices.RewardsWarning")]

Base = Callable[[], nn.Module]

PREFERENCES = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}."} for i in range(16)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "SFT": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES],
    "DPO": PREFERENCES,
    "KTO": [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in PREFERENCES
        for kind in ("chosen", "rejected")
    ],
    "GRPO": [{"prompt": row["prompt"]} for row in PREFERENCES],
    "RLOO": [{"prompt": row["prompt"]} for row in PREFERENCES],
}
SAMPLING = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}


def digits(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward: the share of digits in what was generated."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def trainer(
    method: str, model: nn.Module, folder: Path, tokenizer: Any, config: PissaConfig | None, **others: Any
) -> Any:
    import trl
    from datasets import Dataset

    rewarded = method in ("GRPO", "RLOO")
    arguments = options(folder, max_steps=3, save_strategy="no", **(SAMPLING if rewarded else {}), **others)
    return getattr(trl, f"{method}Trainer")(
        model,
        **({"reward_funcs": digits} if rewarded else {}),
        args=getattr(trl, f"{method}Config")(**arguments),
        train_dataset=Dataset.from_list(ROWS[method]),
        processing_class=tokenizer,
        peft_config=config,
    )


def config(**fields: Any) -> PissaConfig:
    return PissaConfig(r=4, task_type="CAUSAL_LM", **fields)


@forms
@pytest.mark.parametrize("method", each(ROWS, ["SFT", "DPO", "GRPO"]))
def test_losses_are_those_of_the_wrapped_model(
    method: str, form: str, base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    """Bit for bit. For a wrapped model TRL keeps a copy of its adapter as the reference, here it switches it off."""
    given = config(**FORMS[form])
    ours = trainer(method, base(), tmp_path / "ours", tokenizer, given)
    assert isinstance(ours.model, PissaModel)
    ours.train()
    wrapped = trainer(method, pissa.wrap(base(), given), tmp_path / "wrapped", tokenizer, None)  # sets the seed again
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


@pytest.mark.parametrize("method", ["DPO", "KTO"])
@pytest.mark.parametrize("by_config", each([True, False], [True]))
def test_a_reference_that_is_computed_before(
    method: str, by_config: bool, base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    """In batches of other lengths, padded otherwise: equal but for the order of sums."""
    others = {"precompute_ref_log_probs": True, "bf16": False}
    given = config(quant="nf4")
    model = base() if by_config else pissa.wrap(base(), given)
    run = trainer(method, model, tmp_path, tokenizer, given if by_config else None, **others)
    run.train()
    # beta = 0.1, and a log-probability of at most 8 characters is a sum of at most 8 logarithms, each below 8
    expected = math.log(2) if method == "DPO" else 0.5
    assert logged(run)[0] == pytest.approx(expected, abs=0.1 * 4 * 64 * TERMS * 2**-24)
    assert logged(run)[-1] < expected


def chat_template(tokenizer: Any, folder: Path) -> Path:
    """The folder of a tokenizer with two more tokens, and a template that uses them."""
    tokenizer.add_tokens(["<|turn|>", "<|end|>"])
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return folder


FIELDS: dict[str, dict[str, Any]] = {
    "none given": {},
    "others given": {"trainable_token_indices": {"embed_tokens": [3]}, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("fields", FIELDS)
def test_tokens_that_the_trainer_adds(
    fields: str, base: Base, folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    had = FIELDS[fields]
    given = config(**copy.deepcopy(had))
    plain = AutoTokenizer.from_pretrained(folder)
    ours = trainer("SFT", base(), tmp_path, plain, given, chat_template_path=chat)

    model, again, added = seeded(base(), AutoTokenizer.from_pretrained(folder), chat)
    rows = had.get("trainable_token_indices", {}).get("embed_tokens", []) + added
    modules = [*had.get("modules_to_save", []), "lm_head"]
    wanted = config(trainable_token_indices={"embed_tokens": rows}, modules_to_save=modules)
    wrapped = trainer("SFT", pissa.wrap(model, wanted), tmp_path, again, None)

    assert ours.model.peft_config["default"].trainable_token_indices == {"embed_tokens": rows}
    assert any("trainable_tokens_delta" in name for name in trainable(ours.model))
    assert any("lm_head.modules_to_save" in name for name in trainable(ours.model))
    assert trainable(ours.model) == trainable(wrapped.model)
    for run in (ours, wrapped):
        run.train()
    assert logged(ours) == logged(wrapped)
    assert_equal(state(ours.model), state(wrapped.model))

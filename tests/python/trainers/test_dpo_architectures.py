"""Preferences on every causal architecture: TRL's reference is the base that the policy starts from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import architecture_checks as checks
import trainers
from architectures import ARCHITECTURES, VOCABULARY
from daily import each

pytestmark = [trainers.quiet, pytest.mark.filterwarnings("ignore::pissa.notices.AllLinearWarning")]


def tokenizer() -> Any:
    """Words w0, w1, ... as many as the models' vocabulary has room for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[pad]": 0, "[bos]": 1, "[eos]": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="w3"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[pad]", bos_token="[bos]", eos_token="[eos]")


CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.is_causal]
DAILY = ("mixtral", "qwen2_5_vl")


@pytest.mark.parametrize("name", each(CAUSAL, DAILY))
def test_a_step_of_dpo(name: str, tmp_path: Path) -> None:
    """A step of TRL's DPOTrainer: it starts where policy and reference are one, so that the loss is ln 2, moves the
    policy and leaves the reference, which is the base, where it was."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": f"w{i} w{i + 1} ", "chosen": f"w{i + 2} w9", "rejected": f"w{i + 3}"} for i in range(5, 9)]
    options = trainers.options(tmp_path, max_steps=1, bf16=False, gradient_checkpointing=False, save_strategy="no")
    options["router_aux_loss_coef"] = 0.0  # else the loss of routers comes on top
    architecture = ARCHITECTURES[name]
    model = checks.wrapped(architecture, {})
    batch = architecture.batch()
    base = checks.output(model, batch)
    trainer = DPOTrainer(
        model, args=DPOConfig(**options), train_dataset=Dataset.from_list(pairs), processing_class=tokenizer()
    )
    trainer.train()
    (loss,) = trainers.logged(trainer)
    assert abs(loss - math.log(2)) <= 2**-24, f"the loss is {loss}, not ln 2"
    assert trainers.logged(trainer, "rewards/chosen") == [0.0]
    model.eval()
    assert not torch.equal(checks.output(model, batch), base)
    model.set_adapter("ref")
    assert torch.equal(checks.output(model, batch), base)

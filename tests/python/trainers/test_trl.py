"""TRL's trainers on a small Llama: they train our model as any PeftModel, and its reference is what it started from."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import pissa
from daily import each
from language_models import logits
from pissa import PissaModel, ops
from trainers import FORMS, PREFERENCES, assert_equal, forms, logged, quiet, state, trainable, trl_trainer, unchanged

pytestmark = quiet
# It resumes TRL's "ref", which has a folder of its own; "default", beside it, starts again. So does plain PEFT's.
resumes_both = pytest.mark.skipif(Version(version("transformers")) < Version("5.23"), reason="transformers before 5.23")

Base = Callable[[], nn.Module]


def wrapped(model: nn.Module, form: str, **fields: Any) -> PissaModel:
    return pissa.wrap(model, r=4, task_type="CAUSAL_LM", **FORMS[form], **fields)


def without_autocast(run: Any) -> nn.Module:
    """The trained model. A run in bfloat16 leaves it with accelerate's autocast around its forward."""
    return run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()


# -- supervised fine-tuning


def sft(model: nn.Module, folder: Path, tokenizer: Any, **others: Any) -> Any:
    return trl_trainer("SFT", model, folder, tokenizer, max_length=32, **others)


def loss_of(run: Any) -> float:
    return run.evaluate()["eval_loss"]


@forms
@pytest.mark.parametrize("packing", each([False, True], [False]))
def test_supervised_fine_tuning(form: str, packing: bool, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    """It starts at the base's loss, leaves the base alone, and its folder holds what was trained."""
    run = sft(wrapped(base(), form), tmp_path, tokenizer, packing=packing)
    assert (len(run.train_dataset) < len(PREFERENCES)) == packing
    assert run.args.bf16  # TRL's default: autocast
    assert run.args.gradient_checkpointing
    start = loss_of(run)
    if form == "implicit":
        # Up to the rounding of its logits to bfloat16, and of the sums of both heads.
        assert start == pytest.approx(loss_of(sft(base(), tmp_path, tokenizer, packing=packing)), rel=2**-8)
    with unchanged(run.model):
        run.train()
    assert loss_of(run) < start
    with run.model.disable_adapter():
        assert loss_of(run) == start

    run.save_model(tmp_path / "end")
    again = PissaModel.from_pretrained(base(), tmp_path / "end", is_trainable=True)
    assert loss_of(sft(again, tmp_path, tokenizer, packing=packing)) == loss_of(run)


# -- a loss without logits


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO"])
def test_a_fused_head_has_their_losses(method: str, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    """And their metrics, with accumulated gradients. Losses are of two sums of float32 in orders of their own."""
    if method != "SFT" and Version(version("trl")) < Version("1.15"):
        pytest.skip("TRL before 1.15 computes these losses from logits")

    def run(fused: bool) -> Any:
        model = wrapped(base(), "implicit", fuse=fused)
        found = trl_trainer(method, model, tmp_path, tokenizer, bf16=False, gradient_accumulation_steps=2)
        with pytest.MonkeyPatch.context() as patch:
            scores, calls = ops.token_scores, []
            patch.setattr(ops, "token_scores", lambda *args, **of: calls.append(1) or scores(*args, **of))
            found.train()
            assert bool(calls) == fused
            calls.clear()
            found.evaluate()  # whose references then round as the policy does
            assert bool(calls) == fused
        return found

    ours, theirs = run(True), run(False)
    rows = [row for row in theirs.state.log_history if "loss" in row]
    assert len(rows) >= 3
    for row, expected in zip((row for row in ours.state.log_history if "loss" in row), rows, strict=True):
        for key in expected.keys() - {"grad_norm"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


# -- preferences


def dpo(model: nn.Module, folder: Path, tokenizer: Any, **others: Any) -> Any:
    # Without autocast: before 1.16 TRL asks for a reference with it or without, as the model then is.
    return trl_trainer("DPO", model, folder, tokenizer, bf16=False, **others)


def batch_of(run: Any) -> dict[str, Tensor]:
    return next(iter(run.get_eval_dataloader()))


def reference_of(run: Any) -> Tensor:
    """Log-probabilities of the chosen and the rejected answers, under the reference that TRL finds in the model."""
    return torch.stack(run.compute_ref_log_probs(run.model.eval(), batch_of(run)))


@resumes_both
@forms
def test_preferences_start_from_the_base_and_go_on(form: str, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    """For a model that comes with an adapter TRL adds a copy of it, "ref". With `peft_config=` it switches the adapter
    off instead, in test_peft_config.py."""
    run = dpo(wrapped(base(), form), tmp_path / "whole", tokenizer)
    assert list(run.model.peft_config) == ["default", "ref"]
    assert not any(".ref." in name for name in trainable(run.model))
    reference = reference_of(run)
    with run.model.disable_adapter():
        assert torch.equal(reference, reference_of(run))
    if form == "implicit":
        alone = dpo(base(), tmp_path, tokenizer, ref_model=base())
        theirs = torch.stack(alone.compute_ref_log_probs(alone.ref_model, batch_of(alone)))
        torch.testing.assert_close(reference, theirs, rtol=1e-6, atol=0)  # sums of float32 in two orders

    with unchanged(run.model):
        run.train()
    assert logged(run)[0] == torch.tensor(2.0).log().item()  # exactly: log-probabilities of equal bits
    assert logged(run, "rewards/margins")[0] == 0
    assert logged(run)[-1] < math.log(2)
    assert torch.equal(reference_of(run), reference)

    resumed = dpo(wrapped(base(), form), tmp_path / "resumed", tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed) == logged(run)
    assert_equal(state(resumed.model), state(run.model))
    assert trainable(resumed.model) == trainable(run.model)

    again = PissaModel.from_pretrained(base(), tmp_path / "whole" / "checkpoint-6")
    ids = batch_of(run)["input_ids"]
    assert torch.equal(logits(again, ids), logits(without_autocast(run), ids))


KINDS: dict[str, dict[str, Any]] = {
    **FORMS,
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
NOT_COPIED = pytest.mark.xfail(reason="TRL copies parameters named *.default.*; embeddings' have none, PEFT's neither")


@pytest.mark.parametrize(
    "kind", [*each(KINDS, ["a head of its own"]), pytest.param("embedding", marks=[NOT_COPIED, pytest.mark.nightly])]
)
@pytest.mark.parametrize("from_folder", each([False, True], [True]))
def test_the_reference_of_a_trained_adapter_is_that_adapter(
    kind: str, from_folder: bool, base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    model = pissa.wrap(base(), r=4, task_type="CAUSAL_LM", **KINDS.get(kind, EMBEDDING))
    sft(model, tmp_path, tokenizer, save_strategy="no").train()
    if from_folder:
        model.save_pretrained(tmp_path / "sft")
        model = PissaModel.from_pretrained(base(), tmp_path / "sft", is_trainable=True)
    run = dpo(model, tmp_path, tokenizer)
    start = reference_of(run)
    with run.model.disable_adapter():
        assert not torch.equal(start, reference_of(run))
    policy = dpo(base(), tmp_path, tokenizer, ref_model=base())  # to ask for the policy's own log-probabilities
    assert torch.equal(start, torch.stack(policy.compute_ref_log_probs(run.model, batch_of(run))))
    for layer in (module for module in run.model.modules() if isinstance(module, pissa.layers.PissaLinear)):
        assert layer.start_of("ref") is layer.start_of("default")


@forms
def test_a_reward_model(form: str, folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    def base() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the head is new
            return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    def trainer(model: nn.Module) -> Any:
        return trl_trainer("Reward", model, tmp_path, tokenizer)

    run = trainer(pissa.wrap(base(), r=4, task_type="SEQ_CLS", **FORMS[form]))
    start = loss_of(run)
    if form == "implicit":
        assert start == loss_of(trainer(base()))
    with unchanged(run.model):
        run.train()
    assert loss_of(run) < start
    again = PissaModel.from_pretrained(base(), tmp_path / "checkpoint-6", is_trainable=True)
    assert loss_of(trainer(again)) == loss_of(run)


# -- rewards


@forms
@pytest.mark.parametrize("method", each(["GRPO", "RLOO"], ["GRPO"]))
def test_rewards(form: str, method: str, base: Base, tokenizer: Any, tmp_path: Path) -> None:
    run = trl_trainer(method, wrapped(base(), form), tmp_path, tokenizer)
    with unchanged(run.model):
        run.train()
    assert list(run.model.peft_config) == ["default", "ref"]
    assert logged(run, "kl")[0] == 0
    assert logged(run, "kl")[-1] != 0
    again = PissaModel.from_pretrained(base(), tmp_path / "checkpoint-6")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(logits(again, ids), logits(without_autocast(run), ids))

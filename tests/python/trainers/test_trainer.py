"""transformers' Trainer on a small Llama: it trains with what users turn on, resumes, and reloads the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from daily import each
from language_models import Make, logits
from pissa import PissaModel
from pissa.layers import PissaLinear
from trainers import FORMS, TERMS, assert_equal, compiles, forms, logged, options, quiet, state, trainable, unchanged

pytestmark = quiet


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 97, (16, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: nn.Module, folder: Path, optimizer: torch.optim.Optimizer | None = None, **others: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**options(folder, **others))
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:4], optimizers=(optimizer, None))


def moved(model: nn.Module) -> Tensor:
    """Everything that is trained in one vector, from a start at zero: how far it has come."""
    return torch.cat([model.get_parameter(name).detach().flatten() for name in trainable(model)])


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "evaluated in between": {"eval_strategy": "steps", "eval_steps": 2},
    "gradients accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bfloat16": {"bf16": True},
}


KINDS: dict[str, dict[str, Any]] = {
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "nf4, a head and norms": {"modules_to_save": ["lm_head", "input_layernorm"], "quant": "nf4"},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
RUNS = {f"{form}, {setting}": (FORMS[form], SETTINGS[setting]) for form in FORMS for setting in SETTINGS}
RUNS |= {kind: (fields, {}) for kind, fields in KINDS.items()}


@pytest.mark.parametrize("run", each(RUNS, ["nf4, a head and norms", "dora"]))
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    run: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    fields, setting = RUNS[run]
    whole = trainer(pissa.wrap(tiny_llama(), r=4, **fields), tmp_path / "whole", **setting)
    before = state(whole.model)
    with unchanged(whole.model):
        whole.train()
    assert run in KINDS or logged(whole)[-1] < logged(whole)[0]
    still = [name for name in trainable(whole.model) if torch.equal(whole.model.get_parameter(name), before[name])]
    assert not still

    resumed = trainer(pissa.wrap(tiny_llama(), r=4, **fields), tmp_path / "resumed", **setting)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed) == logged(whole)
    assert_equal(state(resumed.model), state(whole.model))

    again = PissaModel.from_pretrained(tiny_llama(), tmp_path / "resumed" / "checkpoint-6")
    model = whole.accelerator.unwrap_model(whole.model, keep_fp32_wrapper=False).eval()
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@forms
def test_accumulated_gradients_are_those_of_the_whole_batch(form: str, tiny_llama: Make, tmp_path: Path) -> None:
    # One step from the start: SGD moves the parameters by the gradient. Its entries are sums over 4 x 8 tokens, halved
    # here into two; both orders of summation lie within n u sum|terms| of the exact one.
    moves = []
    for setting in ("plain", "gradients accumulated"):
        model = pissa.wrap(tiny_llama(), r=4, **FORMS[form])
        trainer(model, tmp_path, optim="sgd", max_steps=1, max_grad_norm=0.0, **SETTINGS[setting]).train()
        moves.append(moved(model))
    assert (moves[0] - moves[1]).norm() <= 2 * 32 * 2**-24 * moves[0].norm()
    assert moves[0].norm() > 0


def test_the_best_model_is_loaded_at_the_end(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    # "Best" is the highest loss here, which an earlier checkpoint has than the last.
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "greater_is_better": True}
    model = pissa.wrap(tiny_llama(), r=4, modules_to_save=["lm_head"])
    run = trainer(model, tmp_path, eval_steps=3, **best)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    loaded = logits(model.eval(), tokens)
    third, last = (PissaModel.from_pretrained(tiny_llama(), tmp_path / f"checkpoint-{step}") for step in (3, 6))
    assert torch.equal(loaded, logits(third, tokens))
    assert not torch.equal(loaded, logits(last, tokens))


# -- optimisers


@forms
def test_lora_plus_gives_b_a_rate_of_its_own(form: str, tiny_llama: Make, tmp_path: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    model = pissa.wrap(tiny_llama(), r=4, target_modules=["q_proj", "up_proj", "embed_tokens"][: 3 - (form == "nf4")])
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(rates) == sorted(trainable(model))
    for name, rate in rates.items():
        assert rate == (1e-6 if "embedding" in name else 1e-3 if "lora_A" in name else 16e-3)

    trainer(model, tmp_path, optimizer, max_steps=1, lr_scheduler_type="constant", save_strategy="no").train()
    for layer in (module for module in model.modules() if isinstance(module, PissaLinear)):
        # AdamW's first step is lr g / (|g| + 1e-8).
        for delta, rate in zip(layer.deltas("default"), (1e-3, 16e-3), strict=True):
            assert delta.detach().abs().max().item() == pytest.approx(rate, rel=1e-3)


@pytest.mark.nightly
def test_the_8_bit_optimiser_trains_and_resumes(tiny_llama: Make, tmp_path: Path) -> None:
    def model() -> PissaModel:
        return pissa.wrap(tiny_llama(hidden_size=128), r=32, quant="nf4")

    whole = trainer(model(), tmp_path / "whole", optim="adamw_bnb_8bit")
    with unchanged(whole.model):
        whole.train()
    assert logged(whole)[-1] < logged(whole)[0]
    # bitsandbytes keeps 32 bits for parameters of fewer than 4096 elements.
    kept = whole.optimizer.optimizer.state
    assert {state["state1"].dtype for p, state in kept.items() if p.numel() >= 4096} == {torch.uint8}
    resumed = trainer(model(), tmp_path / "resumed", optim="adamw_bnb_8bit")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed) == logged(whole)
    assert_equal(state(resumed.model), state(whole.model))


# -- torch.compile


@pytest.mark.slow
@compiles
@forms
def test_a_compiled_model_trains_alike(
    form: str, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments sets it for the rest of the process
    runs = []
    for compiled in (False, True):  # accelerate compiles all that is prepared after a trainer was made that asks for it
        model = pissa.wrap(tiny_llama(), r=4, **FORMS[form])
        # SGD, since AdamW's first step takes the sign of a gradient of any size.
        run = trainer(model, tmp_path / str(compiled), optim="sgd", torch_compile=compiled)
        run.train()
        runs.append(run)
    assert [hasattr(run.model_wrapped, "_orig_mod") for run in runs] == [False, True]
    # Inductor sums in other orders: once in each loss, and in six gradients.
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), rel=TERMS * 2**-24)
    eager, compiled = (moved(run.model) for run in runs)
    assert (compiled - eager).norm() <= TERMS * 2**-24 * eager.norm()
    again = PissaModel.from_pretrained(tiny_llama(), tmp_path / "True" / "checkpoint-6")
    assert_equal(state(again), state(runs[1].model))

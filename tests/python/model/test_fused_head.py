"""fuse_head: transformers' own loss and gradients for every causal language model, and what is left to the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import pissa
from architectures import ARCHITECTURES, TEXT
from daily import each
from pissa import ops
from pissa.base.weights import CodedLinear
from pissa.model import fused_head

CAUSAL = [name for name, one in ARCHITECTURES.items() if one.is_causal]
DAILY = ["llama3", "gemma2", "gpt_oss", "mamba2", "gpt2"]
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.PissaWarning")


def wrapped(name: str, **fields: Any) -> Any:
    return pissa.wrap(ARCHITECTURES[name].make(), **ARCHITECTURES[name].config(**fields))


def half_masked(name: str) -> dict[str, Tensor]:
    batch = ARCHITECTURES[name].batch()
    labels = batch["labels"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    return batch | {"labels": labels}


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", each(CAUSAL, DAILY))
def test_the_models_own_loss(name: str) -> None:
    model = wrapped(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    batch = half_masked(name)
    own, gradients = loss_and_gradients(model, batch)
    pissa.fuse_head(model)
    for items in ({}, {"num_items_in_batch": torch.tensor(50)}):
        fused, found = loss_and_gradients(model, batch | items)
        times = (batch["labels"][:, 1:] != -100).sum() / 50 if items else 1
        torch.testing.assert_close(fused.loss, own.loss * times, rtol=2e-5, atol=1e-6)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other * times, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-9)
    assert isinstance(fused, fused_head.ScoredOutput)
    assert fused.logits is None
    assert torch.equal(model(**{**batch, "labels": None}).logits, own.logits)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 8.0}),
        ("HyperCLOVAX", {"logits_scaling": 0.5}),
        ("FalconH1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}),
    ],
)
def test_scaled_logits(kind: str, fields: dict[str, float]) -> None:
    config = getattr(transformers, f"{kind}Config")(**TEXT, **fields, num_key_value_heads=4, pad_token_id=0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    batch = half_masked("llama3")
    own = model(**batch).loss
    pissa.fuse_head(model)
    fused = model(**batch)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, own, rtol=2e-5, atol=1e-6)


def test_scores_are_those_of_the_logits() -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    pissa.fuse_head(model)
    found = model(**batch)
    expected = fused_head._scores_of_logits(logits, labels)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.label_mask, labels != -100)
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    again = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), shift_labels=shifted)
    torch.testing.assert_close(again.loss, found.loss)
    assert again.log_probs.shape == shifted.shape


def test_a_head_in_codes() -> None:
    model = ARCHITECTURES["llama3"].make()
    head = model.lm_head
    model.lm_head = CodedLinear(ops.quantize(head.weight.detach(), blocksize=64), None)
    batch = half_masked("llama3")
    own = model(**batch).loss
    pissa.fuse_head(model)
    fused = model(**batch)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flagged", [False, True])
def test_a_head_with_an_adapter_computes_its_logits(flagged: bool) -> None:
    model = wrapped("llama3", target_modules=["q_proj", "lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.add_(0.1)
    batch = half_masked("llama3")
    own, gradients = loss_and_gradients(model, batch)
    pissa.fuse_head(model)
    output, found = loss_and_gradients(model, batch | ({"fused_lm_head": True} if flagged else {}))
    torch.testing.assert_close(output.loss, own.loss)
    assert (output.logits is None) == flagged
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_trained_head_computes_its_logits() -> None:
    model = ARCHITECTURES["llama3"].make()
    pissa.fuse_head(model)
    assert model(**half_masked("llama3")).logits is not None


def test_a_head_that_a_router_reports_beside_keeps_its_loss() -> None:
    model, batch = wrapped("mixtral"), half_masked("mixtral") | {"output_router_logits": True}
    own = model(**batch).loss
    pissa.fuse_head(model)
    output = model(**batch)
    assert torch.equal(output.loss, own)
    assert output.aux_loss is not None


def test_peft_models_too() -> None:
    model = get_peft_model(ARCHITECTURES["llama3"].make(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    batch = half_masked("llama3")
    own = model(**batch).loss
    pissa.fuse_head(model)
    fused = model(**batch)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "use_cache"])
def test_what_asks_for_more_than_a_loss_gets_it(asked: str) -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    pissa.fuse_head(model)
    output = model(**batch, **{asked: True})
    assert output.logits is not None
    name = {"output_hidden_states": "hidden_states", "output_attentions": "attentions", "use_cache": "past_key_values"}
    assert output[name[asked]] is not None


def test_tuples_and_evaluation_are_the_models_own() -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    own = model(**batch)
    pissa.fuse_head(model)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, own.loss)
    assert torch.equal(logits, own.logits)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, own.logits)
        assert model.train()(**batch).logits is None
        assert model.eval()(**batch, fused_lm_head=True).logits is None


def test_an_auxiliary_loss_that_the_text_configuration_asks_for() -> None:
    model, batch = wrapped("mixtral"), half_masked("mixtral")
    model.config.get_text_config().output_router_logits = True
    own = model(**batch).loss
    pissa.fuse_head(model)
    assert torch.equal(model(**batch, output_router_logits=None).loss, own)


def test_a_head_with_hooks_computes_its_logits() -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    model.base_model.model.lm_head.register_forward_pre_hook(lambda _, given: (given[0] * 0.5,))
    own = model(**batch).loss
    pissa.fuse_head(model)
    assert torch.equal(model(**batch).loss, own)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("ModernBertDecoder", {"num_key_value_heads": 4, "pad_token_id": 0}),
        ("Roberta", {"is_decoder": True, "type_vocab_size": 1}),
        ("Bart", {"d_model": 64, "decoder_layers": 1, "decoder_ffn_dim": 64, "is_decoder": True}),
    ],
)
def test_other_heads_are_found_out(kind: str, fields: dict[str, Any]) -> None:
    config = getattr(transformers, f"{kind}Config")(**(TEXT | fields))
    config.is_encoder_decoder = False
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    forward = model.forward
    with pytest.raises(ValueError, match=r"its configuration does not describe|has a loss of its own|cannot be tried"):
        pissa.fuse_head(model)
    assert model.forward == forward


def test_the_generators_and_modes_are_left_as_they_were() -> None:
    model = wrapped("gpt2").train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    pissa.fuse_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_temperature_of_trls_is_refused() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("TRL before 1.15 has no temperature there")
    model = wrapped("llama3")
    utils.add_fused_lm_head(model.get_base_model(), temperature=0.7)
    with pytest.raises(ValueError, match="TRL's head of this trainer has a temperature"):
        pissa.fuse_head(model)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="model: got a Linear; needed: a causal language model"):
        pissa.fuse_head(nn.Linear(2, 2))
    model = ARCHITECTURES["llama3"].make()
    model.config.logit_scale = 0.5  # which a Llama does not heed
    with pytest.raises(ValueError, match="in a way that its configuration does not describe: they differ by"):
        pissa.fuse_head(model)
    model.config.logit_scale = None
    with pytest.raises(TypeError, match="model: got a T5ForConditionalGeneration"):
        pissa.fuse_head(ARCHITECTURES["t5"].make())
    model.loss_function = lambda *_, **__: None
    with pytest.raises(ValueError, match="has a loss of its own"):
        pissa.fuse_head(model)

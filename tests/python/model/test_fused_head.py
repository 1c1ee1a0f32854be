"""A head that is fused: transformers' own loss, logits and gradients for every causal language model, and what is left
to the model."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn

import pissa
from architecture_checks import without_dropout
from architectures import ARCHITECTURES, TEXT
from daily import each
from pissa import ops
from pissa.base import lazy_tensor
from pissa.base.weights import CodedLinear
from pissa.model import fused_head

CAUSAL = [name for name, one in ARCHITECTURES.items() if one.is_causal]
DAILY = ["llama3", "gemma2", "gpt_oss", "mamba2", "gpt2"]
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.PissaWarning")


def wrapped(name: str, fuse: bool = True, **fields: Any) -> Any:
    """In training mode, without dropout."""
    return without_dropout(pissa.wrap(ARCHITECTURES[name].make(), fuse=fuse, **ARCHITECTURES[name].config(**fields)))


def fused(model: Any) -> Any:
    fused_head.fuse_head(model)
    return without_dropout(model)


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
    model = wrapped(name, fuse=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    batch = half_masked(name)
    own, gradients = loss_and_gradients(model, batch)
    fused_head.fuse_head(model.get_base_model())
    for items in ({}, {"num_items_in_batch": torch.tensor(50)}):
        found, found_gradients = loss_and_gradients(model, batch | items)
        times = (batch["labels"][:, 1:] != -100).sum() / 50 if items else 1
        torch.testing.assert_close(found.loss, own.loss * times, rtol=2e-5, atol=1e-6)
        for one, other in zip(found_gradients, gradients, strict=True):
            torch.testing.assert_close(one, other * times, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-9)
    assert isinstance(found, fused_head.ScoredOutput)
    assert found.logits.shape == own.logits.shape
    torch.testing.assert_close(found.logits, own.logits, rtol=1e-5, atol=1e-5)
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
    own = model(**batch)
    found = fused(model)(**batch)
    assert isinstance(found, fused_head.ScoredOutput)
    torch.testing.assert_close(found.loss, own.loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, own.logits, rtol=2e-5, atol=1e-6)


def test_scores_are_those_of_the_logits() -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    logits, labels = model.eval()(**batch).logits[:, :-1], batch["labels"][:, 1:]
    found = model.train()(**batch)
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
    found = fused(model.requires_grad_(False))(**batch)
    assert isinstance(found, fused_head.ScoredOutput)
    torch.testing.assert_close(found.loss, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flagged", [False, True])
def test_a_head_with_an_adapter_computes_its_logits(flagged: bool) -> None:
    model = wrapped("llama3", target_modules=["q_proj", "lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.add_(0.1)
    batch = half_masked("llama3")
    own, gradients = loss_and_gradients(model.eval(), batch)
    output, found = loss_and_gradients(model.train(), batch | ({"fused_lm_head": True} if flagged else {}))
    torch.testing.assert_close(output.loss, own.loss)
    assert (output.logits is None) == flagged
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_trained_head_computes_its_logits() -> None:
    model = ARCHITECTURES["llama3"].make()
    assert not isinstance(fused(model)(**half_masked("llama3")), fused_head.ScoredOutput)


def test_a_head_that_a_router_reports_beside_keeps_its_loss() -> None:
    model, batch = wrapped("mixtral"), half_masked("mixtral") | {"output_router_logits": True}
    own = model.eval()(**batch).loss
    output = model.train()(**batch)
    torch.testing.assert_close(output.loss, own)
    assert output.aux_loss is not None


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "use_cache"])
def test_what_asks_for_more_than_a_loss_gets_it(asked: str) -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    output = model(**batch, **{asked: True})
    assert not isinstance(output, fused_head.ScoredOutput)
    name = {"output_hidden_states": "hidden_states", "output_attentions": "attentions", "use_cache": "past_key_values"}
    assert output[name[asked]] is not None


def test_tuples_and_evaluation_are_the_models_own() -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    own = ARCHITECTURES["llama3"].make()(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, own.loss)
    torch.testing.assert_close(logits, own.logits)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            output = model.eval()(**batch)
            assert torch.equal(output.loss, own.loss)
            assert type(output) is type(own)
            assert isinstance(model.train()(**batch), fused_head.ScoredOutput)


def test_who_reads_logits_gets_them() -> None:
    """By name, by key and by position, with a gradient and without one, in the dtypes of the model's own."""
    model, batch = wrapped("llama3"), half_masked("llama3")
    plain = wrapped("llama3", fuse=False)
    own, output = plain(**batch), model(**batch)
    wanted = torch.autograd.grad(own.logits.square().sum(), [p for p in plain.parameters() if p.requires_grad])
    for logits in (output.logits, output["logits"], output[1], output.to_tuple()[1]):
        assert (logits.shape, logits.dtype) == (own.logits.shape, own.logits.dtype)
        with torch.no_grad():
            torch.testing.assert_close(logits.float(), own.logits)
            assert not (logits + 0).requires_grad
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(logits.square().sum(), trained, retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model(**batch), plain(**batch).logits
    torch.testing.assert_close(output.logits + 0, expected.float(), rtol=5e-2, atol=5e-2)


def test_logits_that_nobody_reads_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    model(**batch)  # the head is tried once
    monkeypatch.setattr(lazy_tensor, "_values", lambda _: pytest.fail("the head"))
    model(**batch).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):  # as accelerate's, which casts outputs to float32
        output = model(**batch)
    assert convert_to_fp32(output).logits.shape == output.logits.shape


def test_copies_and_pickles() -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    loss = model(**batch).loss
    assert torch.equal(copy.deepcopy(model)(**batch).loss, loss)
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(**batch).loss, loss)


def test_a_forward_pass_of_others_stays() -> None:
    """What has replaced it before, or replaces it after."""
    batch = half_masked("llama3")
    for before in (True, False):
        inner = ARCHITECTURES["llama3"].make()
        model = None if before else pissa.wrap(inner, r=2)
        inner.forward = lambda **_: "theirs"
        model = model or pissa.wrap(inner, r=2)
        assert model.train()(**batch) == "theirs"


def test_an_auxiliary_loss_that_the_text_configuration_asks_for() -> None:
    model, batch = wrapped("mixtral"), half_masked("mixtral")
    model.config.get_text_config().output_router_logits = True
    own = model.eval()(**batch).loss
    torch.testing.assert_close(model.train()(**batch, output_router_logits=None).loss, own)
    assert not isinstance(model(**batch), fused_head.ScoredOutput)


def test_a_head_with_hooks_computes_its_logits() -> None:
    model, batch = wrapped("llama3"), half_masked("llama3")
    model.base_model.model.lm_head.register_forward_pre_hook(lambda _, given: (given[0] * 0.5,))
    own = model.eval()(**batch).loss
    torch.testing.assert_close(model.train()(**batch).loss, own)


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
    assert not isinstance(fused(model)(**half_masked("llama3")), fused_head.ScoredOutput)
    assert not vars(model).get("_fused_shape")


def test_the_generators_and_modes_are_left_as_they_were() -> None:
    model = wrapped("gpt2").train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert isinstance(model(**half_masked("gpt2")), fused_head.ScoredOutput)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def trls_head(model: nn.Module, temperature: float = 1.0) -> dict[str, Any]:
    """Puts TRL's head over a model's. Returns the arguments that ask for it."""
    utils = pytest.importorskip("trl.trainer.utils")
    if hasattr(utils, "add_fused_lm_head"):
        utils.add_fused_lm_head(model, temperature=temperature)
        return {"fused_lm_head": True}
    if temperature != 1:
        pytest.skip("TRL 1.14's has no temperature")
    importlib.import_module("trl.trainer.sft_trainer")._patch_chunked_ce_lm_head(model, chunk_size=8)
    return {}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("before", [True, False])
def test_a_head_of_trls_is_replaced_unless_it_has_a_temperature(before: bool, temperature: float) -> None:
    inner, batch = ARCHITECTURES["llama3"].make(), half_masked("llama3")
    model = None if before else pissa.wrap(inner, r=2)
    asked = trls_head(inner, temperature)
    model = model or pissa.wrap(inner, r=2)
    output = model.train()(**batch, **asked)
    assert isinstance(output, fused_head.ScoredOutput) == (temperature == 1.0)
    own = ARCHITECTURES["llama3"].make()(**batch).loss
    assert (abs(output.loss - own) < 1e-5) == (temperature == 1.0)


def test_codes_are_never_read_by_a_head_of_trls() -> None:
    """In evaluation mode, and where the model computes logits as its configuration does not say."""
    model, batch = ARCHITECTURES["llama3"].make().requires_grad_(False).eval(), half_masked("llama3")
    model.lm_head = CodedLinear(ops.quantize(model.lm_head.weight, blocksize=64), None)
    own = model(**batch).loss
    for scale in (None, 0.5):  # which a Llama does not heed
        other = copy.deepcopy(model)
        other.config.logit_scale = scale
        asked = trls_head(other)
        found = fused(other).eval()(**batch, **asked)
        assert isinstance(found, fused_head.ScoredOutput)
        torch.testing.assert_close(found.loss, own, rtol=1e-5, atol=1e-6)
        assert found.num_valid_tokens == (batch["labels"][:, 1:] != -100).sum()


def test_which_models_are_left_to_themselves() -> None:
    model = ARCHITECTURES["llama3"].make().requires_grad_(False)
    model.config.logit_scale = 0.5  # which a Llama does not heed
    assert not isinstance(fused(model)(**half_masked("llama3")), fused_head.ScoredOutput)
    for other in (nn.Linear(2, 2), ARCHITECTURES["t5"].make(), ARCHITECTURES["roberta"].make()):
        fused_head.fuse_head(other)
        assert "forward" not in vars(other)
    model = ARCHITECTURES["llama3"].make()
    model.loss_function = lambda *_, **__: None
    fused_head.fuse_head(model)
    assert "forward" not in vars(model)

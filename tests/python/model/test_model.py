"""wrap and PissaModel on a small Llama: step 0, what PeftModel does, and failures that leave no trace."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa
from devices import put
from language_models import EVERY_FORM as FORMS
from language_models import Make, add_reference, assert_same, error, logits, snapshot, train
from pissa import PissaConfig, PissaModel, notices
from pissa.base.stored import QuantizedLinear
from pissa.layers import PissaLinear

forms = pytest.mark.parametrize("form", FORMS)


def layers(model: nn.Module) -> Iterator[PissaLinear]:
    return (module for module in model.modules() if isinstance(module, PissaLinear))


# -- step 0


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base(form: str, dtype: torch.dtype, tiny_llama: Make, tokens: Tensor) -> None:
    base = logits(tiny_llama(dtype=dtype), tokens)
    model = pissa.wrap(tiny_llama(dtype=dtype), r=4, **FORMS[form])
    enabled = logits(model, tokens)
    with model.disable_adapter():
        disabled = logits(model, tokens)
    assert torch.equal(enabled, disabled)
    if form == "implicit":
        assert torch.equal(enabled, base)
    elif form == "explicit":
        assert error(enabled, base) <= (2e-6 if dtype == torch.float32 else 2e-2)
    else:  # smaller than what the format alone does to these weights
        plain = tiny_llama(dtype=dtype)
        for module in plain.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = pissa.ops.dequantize(pissa.ops.quantize(module.weight, form)).to(dtype)
        assert error(enabled, base) < error(logits(plain, tokens), base)


def test_all_linear_leaves_the_head_out(tiny_llama: Make) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    assert len(list(layers(model))) == 14
    assert type(model.base_model.model.lm_head) is nn.Linear


# -- what a PeftModel is


def test_it_is_a_peft_model_of_its_task(tiny_llama: Make, tokens: Tensor) -> None:
    plain = pissa.wrap(tiny_llama(), r=4)
    assert type(plain) is PissaModel
    assert isinstance(plain, peft.PeftModel)
    model = pissa.wrap(tiny_llama(), r=4, task_type="CAUSAL_LM")
    assert isinstance(model, PissaModel)
    assert isinstance(model, peft.PeftModelForCausalLM)
    train(model, tokens)
    for wrapped in (plain, model):
        generated = wrapped.generate(input_ids=tokens[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert generated.shape == (3, 7)


def test_classification_trains_and_saves_its_head(tokens: Tensor, tmp_path: object) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def base() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_labels=3, pad_token_id=0,
        )  # fmt: skip
        return put(LlamaForSequenceClassification(config)).eval()

    model = pissa.wrap(base(), r=2, task_type="SEQ_CLS")
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(input_ids=tokens, labels=put(torch.tensor([0, 1, 2]))).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = PissaModel.from_pretrained(base(), tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again, tokens), logits(model.eval(), tokens))
    assert error(logits(peft.PeftModel.from_pretrained(base(), tmp_path), tokens), logits(model, tokens)) < 1e-5


def test_parameter_counts(tiny_llama: Make, capsys: pytest.CaptureFixture[str]) -> None:
    dense = sum(parameter.numel() for parameter in tiny_llama().parameters())
    for fields in FORMS.values():
        model = pissa.wrap(tiny_llama(), r=4, **fields)
        trainable = sum(4 * (layer.in_features + layer.out_features) for layer in layers(model))
        assert model.get_nb_trainable_parameters() == (trainable, dense + trainable)
        model.print_trainable_parameters()
        assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,d} || all params: ")


@forms
def test_add_set_delete(form: str, tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4, **FORMS[form])
    base = logits(model, tokens)
    train(model, tokens)
    first = logits(model, tokens)
    model.add_adapter("second", PissaConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model, tokens), first)
    model.set_adapter("second")
    assert error(logits(model, tokens), base) < 1e-5
    train(model, tokens)
    second = logits(model, tokens)
    assert error(second, base) > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), first)
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model, tokens), second)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("second", PissaConfig(r=2))


def test_a_frozen_reference_as_trl_makes_it(tiny_llama: Make, tokens: Tensor) -> None:
    """TRL's DPO adds an adapter of the same configuration and copies the parameters into it, by name."""
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    train(model, tokens)
    reference = logits(model, tokens)
    add_reference(model)
    train(model, tokens)
    assert error(logits(model, tokens), reference) > 1e-3
    model.set_adapter("ref")
    assert torch.equal(logits(model, tokens), reference)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload(form: str, dtype: torch.dtype, tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(dtype=dtype), r=4, **FORMS[form])
    train(model, tokens)
    trained = logits(model, tokens)
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny_llama())
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == {
        name: tensor.shape for name, tensor in tiny_llama().state_dict().items()
    }
    assert all(parameter.dtype == dtype for parameter in merged.parameters())
    assert error(logits(merged, tokens), trained) < (1e-5 if dtype == torch.float32 else 2e-2)


@forms
@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_base_back(form: str, merged: bool, tiny_llama: Make, tokens: Tensor) -> None:
    base = tiny_llama()
    original = dict(base.named_parameters())
    model = pissa.wrap(base, r=4, **FORMS[form])
    before = logits(model, tokens)
    train(model, tokens)
    if merged:
        model.merge_adapter()
    plain = model.unload()
    assert plain is base
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in plain.modules())
    if form == "implicit":
        assert {name: id(p) for name, p in plain.named_parameters()} == {n: id(p) for n, p in original.items()}
        assert torch.equal(logits(plain, tokens), before)
    else:
        assert plain.state_dict().keys() == original.keys()
        assert error(logits(plain, tokens), before) < 1e-5
    pissa.wrap(plain, r=2)  # can be wrapped anew


@forms
def test_merge_unmerge_disable(form: str, tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4, **FORMS[form])
    base = logits(model, tokens)
    train(model, tokens)
    trained = logits(model, tokens)
    model.merge_adapter()
    assert error(logits(model, tokens), trained) < 1e-5
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    assert error(logits(model, tokens), trained) < 1e-5  # still merged
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), trained)


@forms
def test_copy_pickle_and_state_dict(form: str, tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4, task_type="CAUSAL_LM", **FORMS[form])
    train(model, tokens)
    expected = logits(model, tokens)
    assert torch.equal(logits(copy.deepcopy(model), tokens), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, tokens), expected)
    train(loaded, tokens, steps=1)
    assert torch.equal(logits(model, tokens), expected)

    fresh = pissa.wrap(tiny_llama(seed=5), r=4, task_type="CAUSAL_LM", **FORMS[form])
    assert error(logits(fresh, tokens), expected) > 0.1
    result = fresh.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert torch.equal(logits(fresh, tokens), expected)
    assert pickle.loads(pickle.dumps(model.peft_config)) == model.peft_config


def test_modules_to_save(tiny_llama: Make, tokens: Tensor) -> None:
    model = pissa.wrap(tiny_llama(), r=4, modules_to_save=["lm_head"])
    base = logits(model, tokens)
    train(model, tokens)
    assert error(logits(model, tokens), base) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    merged = model.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear


@forms
def test_training_survives_evaluation(form: str, tiny_llama: Make, tokens: Tensor) -> None:
    """bitsandbytes 0.50 on the CPU repacks its weights in eval() and then returns no gradient."""
    gradients = []
    for interrupted in (False, True):
        model = pissa.wrap(tiny_llama(), r=4, **FORMS[form]).train()
        train(model, tokens)
        if interrupted:
            model.eval()
            logits(model, tokens)
            with model.disable_adapter():
                logits(model, tokens)
            model.train()
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    plain, evaluated = gradients
    assert len(plain) == 28
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)
    assert all(gradient.abs().max() > 0 for gradient in evaluated.values())


@forms
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing(form: str, tiny_llama: Make, tokens: Tensor) -> None:
    losses = []
    for checkpointing in (False, True):
        model = pissa.wrap(tiny_llama(), r=4, **FORMS[form]).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        losses.append(train(model, tokens))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_generic_module_and_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def toy() -> nn.Module:
        return put(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))

    pissa.wrap(toy(), r=2)
    assert capsys.readouterr() == ("", "")
    pissa.wrap(toy(), r=2, progressbar=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "PiSSA init" in captured.err
    assert "2/2" in captured.err


# -- refusals


def test_config_and_fields_together(tiny_llama: Make) -> None:
    with pytest.raises(TypeError, match="either config or its fields, got config and r"):
        pissa.wrap(tiny_llama(), PissaConfig(r=4), r=8)
    with pytest.raises(TypeError, match=r"pissa\.PissaConfig, got LoraConfig"):
        pissa.wrap(tiny_llama(), peft.LoraConfig())
    model = pissa.wrap(tiny_llama(), r=4)
    with pytest.raises(TypeError, match=r"a pissa\.PissaConfig or a peft\.LoraConfig, got LoHaConfig"):
        model.add_adapter("loha", peft.LoHaConfig())


def test_the_config_is_copied(tiny_llama: Make) -> None:
    config = PissaConfig(r=4)
    model = pissa.wrap(tiny_llama(), config)
    assert config.target_modules == "all-linear"
    assert model.peft_config["default"].target_modules != "all-linear"


def test_no_second_wrap(tiny_llama: Make) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    for again in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"adapter already.* model = model\.unload\(\) first.*add_adapter"):
            pissa.wrap(again, r=4)
        with pytest.raises(ValueError, match=r"adapter already.* model = model\.unload\(\) first.*load_adapter"):
            PissaModel.from_pretrained(again, "nowhere")
    pissa.wrap(model.unload(), r=4)


def with_nan(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = math.nan
    return model


def with_meta(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.up_proj.to("meta")
    return model


def with_double(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.up_proj.double()
    return model


class Doubled(nn.Linear):
    """A subclass may compute something else from the same weight."""


def with_subclass(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.up_proj = Doubled(64, 112)
    return model


def with_bitsandbytes(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    model.model.layers[1].mlp.up_proj = bnb.nn.Linear4bit(64, 112, bias=False, quant_type="nf4")
    return model


@pytest.mark.parametrize(
    ("prepare", "fields", "kind", "words"),
    [
        (
            None,
            {"target_modules": ["nope"]},
            ValueError,
            "Target modules {'nope'} not found in the base model",
        ),
        (
            None,
            {"r": 33, "target_modules": ["q_proj", "k_proj"]},
            ValueError,
            "rank 33 is too large for layer model.layers.0.self_attn.k_proj: its weight is 32 x 64, so at most 32. "
            r"Give rank_pattern={'model.layers.0.self_attn.k_proj': 32}, lower r, or leave it out with exclude_modules",
        ),
        (with_nan, {}, ValueError, "layer model.layers.1.mlp.down_proj: weight: contains NaN"),
        (with_nan, {"quant": "nf4"}, ValueError, "layer model.layers.1.mlp.down_proj"),
        (with_meta, {}, ValueError, "model.layers.1.mlp.up_proj is on the meta device"),
        (with_double, {}, TypeError, "model.layers.1.mlp.up_proj is a Parameter of torch.float64"),
        (with_subclass, {"target_modules": ["up_proj"]}, TypeError, "model.layers.1.mlp.up_proj is a .*Doubled"),
        (
            with_bitsandbytes,
            {},
            TypeError,
            "up_proj is a Linear4bit of bitsandbytes, but its weight is not quantised yet",
        ),
        (
            None,
            {"target_modules": ["v_proj", "embed_tokens"], "quant": "nf4"},
            ValueError,
            "embed_tokens is a Embedding",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_failures_leave_the_model_as_it_was(
    prepare: Callable[[nn.Module], nn.Module] | None,
    fields: dict[str, object],
    kind: type[Exception],
    words: str,
    tiny_llama: Make,
) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    base.gradient_checkpointing_enable()
    base = base if prepare is None else prepare(base)
    before = snapshot(base)
    with pytest.raises(kind, match=words):
        pissa.wrap(base, **{"r": 4, **fields})
    assert_same(base, before)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 33, "target_modules": ["q_proj", "v_proj"]}, "rank 33 is too large for layer .*v_proj"),
        ({"r": 2, "residual": "explicit"}, "is nf4 .* and cannot become explicit"),
        ({"r": 2, "quant": "nf4", "blocksize": 128}, "cannot become nf4"),
        ({"r": 2, "quant": "int8"}, "is nf4 .* and cannot become int8"),
        ({"r": 2, "quant": "nf4", "target_modules": ["q_proj", "lm_head"]}, "lm_head is implicit and cannot"),
        ({"r": 2, "target_modules": ["nope"]}, "not found in the base model"),
    ],
)
def test_a_failed_second_adapter_leaves_no_trace(
    config: dict[str, object], words: str, tiny_llama: Make, tokens: Tensor
) -> None:
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4", target_modules=["q_proj", "down_proj"])
    train(model, tokens)
    before, expected = snapshot(model), logits(model, tokens)
    with pytest.raises(ValueError, match=words):
        model.add_adapter("second", PissaConfig(**{"target_modules": ["q_proj"], **config}))
    assert_same(model, before)
    assert torch.equal(logits(model, tokens), expected)
    assert all(set(layer.r) == set(layer.lora_start) == {"default"} for layer in layers(model))
    model.add_adapter("second", PissaConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert torch.equal(logits(model, tokens), expected)


# -- tied embeddings


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_head_is_adapted_without_touching_the_embeddings(tiny_llama: Make, tokens: Tensor) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    embeddings = base.model.embed_tokens.weight.clone()
    before = logits(base, tokens)
    model = pissa.wrap(base, r=4, target_modules=["lm_head"])
    assert error(logits(model, tokens), before) < 1e-6
    train(model, tokens)
    trained = logits(model, tokens)
    assert error(trained, before) > 1e-3
    with pytest.warns(UserWarning, match="no longer tied|part of the adapter"):
        merged = model.merge_and_unload()
    assert error(logits(merged, tokens), trained) < 1e-5
    assert torch.equal(merged.model.embed_tokens.weight, embeddings)


@pytest.mark.parametrize("form", ["explicit", "nf4", "int8"])
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")
def test_a_tied_weight_stays_dense_beside_stored_ones(
    form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    make = lambda: tiny_llama(tie_word_embeddings=True)  # noqa: E731
    base = make()
    embeddings = base.model.embed_tokens.weight
    config = PissaConfig(r=4, target_modules=["lm_head", "q_proj", "down_proj"], **FORMS[form])
    with pytest.warns(notices.TiedWeightWarning, match="the weight of layer lm_head is tied") as caught:
        model = pissa.wrap(base, config)
    assert sum(entry.category is notices.TiedWeightWarning for entry in caught) == 1
    head = model.base_model.model.lm_head
    assert head.base_layer.weight is base.model.embed_tokens.weight is embeddings
    assert {layer.base.form.kind for layer in layers(model) if layer is not head} == {form}
    before = logits(model, tokens)
    train(model, tokens)
    expected = logits(model, tokens)
    assert error(expected, before) > 1e-3
    assert torch.equal(embeddings, make().model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    again = PissaModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again, tokens), expected)
    assert again.base_model.model.lm_head.base_layer.weight is again.base_model.model.model.embed_tokens.weight
    with pytest.warns(notices.TiedWeightWarning, match="the weight of layer lm_head is tied"):
        again.add_adapter("second", config)
    again.set_adapter("second")
    assert torch.equal(logits(again, tokens), before)
    again.load_adapter(tmp_path, "second")
    assert torch.equal(logits(again, tokens), expected)
    assert error(logits(again.merge_and_unload(), tokens), expected) < 1e-5


def test_linear_layers_that_share_a_weight_stay_dense() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("one", "two", "other")})
    model["two"].weight = model["one"].weight
    with pytest.warns(notices.TiedWeightWarning, match="the weight of layer one, two is tied"):
        wrapped = pissa.wrap(model, r=2, quant="nf4")
    assert [layer.base.form.kind for layer in layers(wrapped)] == ["implicit", "implicit", "nf4"]
    assert model["one"].base_layer.weight is model["two"].base_layer.weight


def test_nf4_layers_hold_no_dense_weight(tiny_llama: Make) -> None:
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers(model))
    assert all(parameter.dtype == torch.uint8 for layer in layers(model) for parameter in layer.base_layer.parameters())

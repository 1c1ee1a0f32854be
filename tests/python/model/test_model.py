"""wrap and PissaModel on a small Llama: what PeftModel does, and failures that leave no trace."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa
from devices import put
from language_models import EVERY_FORM as FORMS
from language_models import Make, assert_same, error, logits, snapshot, train
from pissa import PissaConfig, PissaModel, notices
from pissa.layers import PissaLinear

forms = pytest.mark.parametrize("form", FORMS)


def layers(model: nn.Module) -> Iterator[PissaLinear]:
    return (module for module in model.modules() if isinstance(module, PissaLinear))


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
    with pytest.raises(TypeError, match="give config or its fields, got config and r"):
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


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 33, "target_modules": ["q_proj", "v_proj"]}, "rank 33 is too large for layer .*v_proj"),
        ({"r": 2, "residual": "explicit"}, "is nf4 .* and cannot become explicit"),
        ({"r": 2, "quant": "nf4", "double_quant": False}, "cannot become nf4"),
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


@pytest.mark.parametrize("form", ["explicit", "nf4", "int8"])
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
    assert {layer.base.form.name for layer in layers(model) if layer is not head} == {form}
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
    assert [layer.base.form.name for layer in layers(wrapped)] == ["implicit", "implicit", "nf4"]
    assert model["one"].base_layer.weight is model["two"].base_layer.weight

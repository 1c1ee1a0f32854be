"""A kept folder, which every version loads; and folders that do not fit: refused by name, with the model as it was.
Damaged ones: test_damaged."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from damage import write_record
from language_models import FORMS, Make, logits, train
from pissa import PissaConfig, PissaModel, config, notices
from pissa.adapters import pissa_layout
from pissa.layers.layer import pissa_layers

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT = FIXTURES / "format_2"
OWN = {field.name for field in dataclasses.fields(PissaConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}


def kept_base() -> nn.Module:
    base = nn.Sequential(nn.Linear(64, 16))
    base[0].weight.data = torch.arange(1024.0).mul(37).remainder(101).sub(50).div(512).reshape(16, 64)
    base[0].bias.data = torch.arange(16.0).div(64)
    return base


def kept_adapter() -> PissaModel:
    """What is in the folder, by `kept_adapter().save_pretrained(KEPT)`. That of an older format stays beside it."""
    model = pissa.wrap(kept_base(), r=2, lora_alpha=3, target_modules=["0"], quant="nf4")
    a, b = model.base_model.model[0].deltas("default")
    a.data.copy_(torch.arange(128.0).div(1024).reshape(2, 64))
    b.data.copy_(torch.arange(32.0).div(-1024).reshape(16, 2))
    return model


@pytest.mark.cpu_only
def test_a_folder_of_an_earlier_version_loads(tmp_path: Path) -> None:
    model = PissaModel.from_pretrained(kept_base(), KEPT)
    layer, kept = model.base_model.model[0], load_file(KEPT / "pissa.safetensors")
    start, deltas = layer.start_of("default"), layer.deltas("default")
    trained = kept_adapter().base_model.model[0].deltas("default")
    for part, found in (("a0", start.a0), ("b0", start.b0), ("delta_a", deltas.a), ("delta_b", deltas.b)):
        assert torch.equal(found, kept[f"0.{part}"])
    assert torch.equal(deltas.a, trained.a)
    assert torch.equal(deltas.b, trained.b)
    model.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "pissa.safetensors"):
        now, then = (load_file(folder / name) for folder in (tmp_path, KEPT))
        assert now.keys() == then.keys()
        assert all(torch.equal(now[key], then[key]) for key in now)
    now, then = (json.loads((folder / "pissa.json").read_text()) for folder in (tmp_path, KEPT))
    assert (now["format"], now["rest"]) == (then["format"], then["rest"])
    assert then["layers"]["0"]["form"].pop("blocksize") == 64  # which every format fixes now
    assert now["layers"]["0"] | {"stored": ""} == then["layers"]["0"] | {"stored": ""}
    if pissa.ops.build_info()["isa"] != "baseline":  # which rounds the scales otherwise
        assert now["layers"] == then["layers"]


def test_a_folder_from_before_the_first_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pissa\.safetensors has no record: another version"):
        PissaModel.from_pretrained(kept_base(), FIXTURES / "format_1")
    with pytest.raises(ValueError, match=r"format 1 of pissa .* is not 2, .* peft\.PeftModel\.from_pretrained"):
        pissa.PissaConfig.from_pretrained(FIXTURES / "format_1")


def test_another_base_is_refused_by_its_first_layer(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    model.save_pretrained(tmp_path)
    other = tiny_llama()
    for layer in (1, 0):
        other.model.layers[layer].self_attn.v_proj.weight.data[0, 0] += 1e-3
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(ValueError, match=r"first layer that differs is model\.layers\.0\.self_attn\.v_proj"):
        PissaModel.from_pretrained(other, tmp_path)
    assert [name for name, _ in other.named_modules()] == names
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj, whose weight is \[80, 80\]"):
        PissaModel.from_pretrained(tiny_llama(hidden_size=80, head_dim=20), tmp_path)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1.*' has no factors in the model"):
        PissaModel.from_pretrained(tiny_llama(num_hidden_layers=1), tmp_path)


def test_a_base_that_was_changed_after_a_save_is_another_base(tiny_llama: Make, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    model.save_pretrained(tmp_path)
    layer = model.base_model.model.get_submodule(Q)
    with torch.no_grad():
        layer.base_layer.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not the base"):
        PissaModel.from_pretrained(tiny_llama(), tmp_path)


def test_adapters_of_another_base_function_are_refused(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    folders = {}
    for form, fields in FORMS.items():
        folders[form] = tmp_path / form
        pissa.wrap(tiny_llama(), r=4, **fields).save_pretrained(folders[form])
    pissa.wrap(tiny_llama(), r=8, quant="nf4").save_pretrained(tmp_path / "r8")
    for form, fields in FORMS.items():
        model = pissa.wrap(tiny_llama(), r=4, **fields)
        train(model, tokens)
        expected = logits(model, tokens)
        for other, folder in folders.items():
            if other != form:
                for name in ("default", "second"):
                    with pytest.raises(ValueError, match="was trained on another base function"):
                        model.load_adapter(folder, name)
        with pytest.raises(ValueError, match="was trained on another base function"):
            model.load_adapter(tmp_path / "r8", "second")  # for nf4: the same form, but other codes
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("other", [{"r": 8}, {"r": 4, "lora_alpha": 8}])
def test_an_adapter_of_another_shape_is_refused(other: dict[str, int], tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), **other).save_pretrained(tmp_path)
    model = pissa.wrap(tiny_llama(), r=4)
    scaling = other.get("lora_alpha", other["r"]) // other["r"]
    wanted = f"rank 4 and scaling 1 in the model, and rank {other['r']} and scaling {scaling} in the folder"
    with pytest.raises(ValueError, match=wanted):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "second")
    model.merge_adapter(["second"])
    with pytest.raises(ValueError, match=r"adapter 'second' is merged: call unmerge_adapter"):
        model.load_adapter(tmp_path, "second")


def in_parts(model: PissaModel) -> None:
    factor = model.get_submodule("base_model.model." + Q).lora_A["default"].weight
    factor.ds_id, factor.data = 0, torch.empty(0)


def of_an_engine(model: PissaModel) -> None:
    """Which leaves small parameters whole."""
    model.lm_head._parameters = type("ZeROOrderedDict", (dict,), {})(model.lm_head._parameters)


@pytest.mark.parametrize("partition", [in_parts, of_an_engine])
def test_a_model_that_deepspeed_has_partitioned_takes_no_folder(
    partition: Callable[[PissaModel], None], tiny_llama: Make, tmp_path: Path
) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    model.save_pretrained(tmp_path)
    partition(model)
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed ZeRO-3, its adapters too: load the adapter before"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("name", ["q", "model"])
def test_a_model_without_the_layers_is_refused_with_the_folders_name(
    name: str, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is in the message as it is, in that of a layer or as a word."""
    monkeypatch.chdir(tmp_path)
    pissa.wrap(tiny_llama(), r=2, target_modules=["q_proj"]).save_pretrained(name)
    folder = re.escape(str(tmp_path / name))
    with pytest.raises(
        ValueError, match=rf"^the adapter in {folder} cannot be put on this model: Target modules .*q_proj"
    ):
        PissaModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), name)


def test_plain_lora_is_sent_to_peft(tiny_llama: Make, tmp_path: Path) -> None:
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"plain PEFT adapter .* peft\.PeftModel\.from_pretrained"):
        PissaModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"holds no PiSSA adapter: there is no pissa\.json"):
        PissaModel.from_pretrained(tiny_llama(), tmp_path / "nowhere")
    wrapped = pissa.wrap(tiny_llama(), r=4)
    with pytest.raises(ValueError, match="load_adapter"):
        PissaModel.from_pretrained(wrapped, tmp_path)


Q = "model.layers.0.self_attn.q_proj"


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "pissa.json").read_text())
    change(content)
    write_record(folder, content)


def test_the_record_has_of_pefts_fields_what_differs_from_its_defaults(
    tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pissa.wrap(tiny_llama(), r=4, target_modules=["v_proj", "q_proj"], use_rslora=True).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "pissa.json").read_text())["config"]
    assert {name: value for name, value in fields.items() if name not in OWN} == {
        "r": 4,
        "lora_alpha": 4,  # PEFT has another default
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "peft_type": "PISSA",
        "peft_version": peft.__version__,
    }
    assert fields.keys() & OWN == OWN
    # So it is read under a PEFT that lacks the others.
    saved, used = PissaConfig.from_pretrained(tmp_path), config.SUPPORTED | OWN | {"init_lora_weights"}
    fewer = [field for field in pissa_layout._config_fields() if field.name in used]
    assert len(fewer) < len(pissa_layout._config_fields())
    monkeypatch.setattr(pissa_layout, "_config_fields", lambda: fewer)
    assert PissaConfig.from_pretrained(tmp_path) == saved


@pytest.mark.parametrize("value", [None, {}], ids=repr)
def test_an_unknown_field_of_another_peft_is_harmless_where_it_says_nothing(
    value: object, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    model = pissa.wrap(tiny_llama(), r=4)
    train(model, tokens)
    model.save_pretrained(tmp_path)
    edit_record(tmp_path, lambda c: c["config"].update(added_later=value))
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("value", [True, 0, {"a": None}], ids=repr)
def test_an_unknown_field_of_another_peft_is_refused_where_it_says_something(
    value: object, tiny_llama: Make, tmp_path: Path
) -> None:
    pissa.wrap(tiny_llama(), r=4).save_pretrained(tmp_path)
    edit_record(tmp_path, lambda c: c["config"].update(added_later=value))
    words = f"unknown field 'added_later', with the value {value!r}: another version of pissa or peft may know it"
    with pytest.raises(ValueError, match=re.escape(words)):
        PissaModel.from_pretrained(tiny_llama(), tmp_path)


def test_fields_that_former_versions_had(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """With the values that every configuration has now, in the configuration, a layer's form and a base's start."""
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4", quant_iters=2)
    model.add_adapter("second", pissa.PissaConfig(r=2))
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    folder, svd = tmp_path / "second", {"svd": "krylov", "svd_passes": "auto"}

    def as_before(record: dict[str, Any]) -> None:
        record["config"].update(svd, start_norm="singular", blocksize=64)
        for layer in record["layers"].values():
            layer["form"].update(blocksize=64)
            layer["base"].update(svd, blocksize=64)

    edit_record(folder, as_before)
    again = PissaModel.from_pretrained(tiny_llama(), folder, "second")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    layers = [pissa_layers(one.base_model.model)[Q] for one in (model, again)]
    assert layers[0].base.start.origin == layers[1].base.start.origin


@pytest.mark.parametrize(
    ("place", "fields"),
    [
        ("config", {"start_norm": "unit"}),
        ("config", {"svd": "subspace"}),
        ("config", {"svd_passes": 8}),
        ("config", {"blocksize": 128}),
        ("config", {"quant": "nf3"}),
        ("config", {"init": "loftq"}),
        ("config", {"repair": "loftq"}),
        ("form", {"blocksize": 32}),
        ("base", {"init": "loftq"}),
        ("base", {"svd_passes": 8}),
    ],
)
def test_what_only_former_versions_had_is_refused(
    place: str, fields: dict[str, Any], tiny_llama: Make, tmp_path: Path
) -> None:
    model = pissa.wrap(tiny_llama(), r=4, quant="nf4")
    model.add_adapter("second", pissa.PissaConfig(r=2))
    model.save_pretrained(tmp_path)
    folder = tmp_path / "second"
    edit_record(folder, lambda c: (c if place == "config" else c["layers"][Q])[place].update(fields))
    [(name, value)] = fields.items()
    words = (
        f"{folder / 'pissa.safetensors'} cannot be read: {name} is {value!r}, which only earlier versions of pissa "
        "support: make the folder again with this one. peft.PeftModel.from_pretrained still reads the plain LoRA of an "
        "adapter [P059]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        PissaModel.from_pretrained(tiny_llama(), folder, "second")


def test_a_residual_that_rounds_otherwise_is_said(tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), r=4, quant="nf4").save_pretrained(tmp_path)
    edit_record(tmp_path, lambda c: c["layers"][Q].update(stored=f"xxh3:uint8:{'0' * 32}"))
    with pytest.warns(notices.OtherRoundingWarning, match=f"residual of 1 layers, {Q} the first,") as caught:
        PissaModel.from_pretrained(tiny_llama(), tmp_path)
    assert caught[-1].filename == __file__

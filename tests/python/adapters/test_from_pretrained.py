"""PEFT's signatures of from_pretrained and load_adapter, and the adapters of the Hugging Face Hub, from a cache."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from torch import Tensor

import pissa
from hub_cache import COMMIT, HubCache
from language_models import FORMS, Make, assert_same, logits, snapshot, train
from pissa import PissaConfig, PissaModel
from pissa.adapters.pissa_layout import ADAPTER_FILES

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


@pytest.fixture
def folder(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> Path:
    """An adapter, and one of rank 2 in its sub-folder "second"."""
    model = pissa.wrap(tiny_llama(), r=4, task_type="CAUSAL_LM")
    model.add_adapter("second", PissaConfig(r=2))
    for name in ("second", "default"):
        model.set_adapter(name)
        train(model, tokens)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["from_pretrained", "load_adapter"])
def test_the_signature_is_pefts(name: str) -> None:
    theirs, ours = (
        [(p.name, p.default, p.kind) for p in inspect.signature(getattr(cls, name)).parameters.values()]
        for cls in (peft.PeftModel, PissaModel)
    )
    assert [parameter for parameter in ours if parameter[0] != "config"] == [p for p in theirs if p[0] != "config"]
    assert "config" in [parameter[0] for parameter in ours]


def test_options_that_change_nothing(folder: Path, tiny_llama: Make, tokens: Tensor) -> None:
    options = {"device_map": "auto", "low_cpu_mem_usage": True, "ephemeral_gpu_offload": True, "torch_device": "cpu"}
    options |= {"ignore_mismatched_sizes": False, "key_mapping": {}, "max_memory": None, "unknown": 1, "revision": "x"}
    model = PissaModel.from_pretrained(tiny_llama(), folder, **options)
    expected = logits(PissaModel.from_pretrained(tiny_llama(), folder), tokens)
    assert torch.equal(logits(model, tokens), expected)
    model.load_adapter(folder, "again", **options)
    assert list(model.peft_config) == ["default", "again"]
    model.set_adapter("again")
    assert torch.equal(logits(model, tokens), expected)


def test_a_subfolder(folder: Path, tiny_llama: Make, tokens: Tensor) -> None:
    model = PissaModel.from_pretrained(tiny_llama(), folder, subfolder="second")
    assert torch.equal(
        logits(model, tokens), logits(PissaModel.from_pretrained(tiny_llama(), folder / "second"), tokens)
    )
    assert model.peft_config["default"].r == 2
    assert PissaConfig.from_pretrained(folder, subfolder="second").r == 2
    model.load_adapter(f"{folder}/", "second", subfolder="second/")
    with pytest.raises(ValueError, match="third holds no PiSSA adapter"):
        model.load_adapter(folder, "third", subfolder="third")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key_mapping": {"^model": "new"}}, "key_mapping={.*peft.PeftModel.from_pretrained"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes=True .*peft.PeftModel.from_pretrained"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(
    options: dict[str, object], words: str, folder: Path, tiny_llama: Make
) -> None:
    base, wrapped = tiny_llama(), pissa.wrap(tiny_llama(), r=4)
    before = snapshot(base), snapshot(wrapped)
    with pytest.raises(ValueError, match=words):
        PissaModel.from_pretrained(base, folder, **options)
    for name in ("default", "second"):
        with pytest.raises(ValueError, match=words):
            wrapped.load_adapter(folder, name, **options)
    assert_same(base, before[0])
    assert_same(wrapped, before[1])


def test_the_load_result_is_pefts(tiny_llama: Make, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "ours")
    plain = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4))
    plain.save_pretrained(tmp_path / "plain")
    theirs = plain.load_adapter(tmp_path / "plain", "second")
    for name in ("default", "second"):
        ours = model.load_adapter(tmp_path / "ours", name)
        assert type(ours) is type(theirs)
        assert (ours.missing_keys, ours.unexpected_keys) == ([], [])


# ---- A configuration of one's own ------------------------------------------------------------------------------------


def test_a_given_configuration_is_used(folder: Path, tiny_llama: Make, tokens: Tensor) -> None:
    config = PissaConfig.from_pretrained(folder)
    config.task_type, config.lora_dropout = None, 0.5
    model = PissaModel.from_pretrained(tiny_llama(), folder, config=config)
    assert model.peft_config["default"] is config
    assert config.inference_mode
    assert type(model) is PissaModel
    assert torch.equal(logits(model, tokens), logits(PissaModel.from_pretrained(tiny_llama(), folder), tokens))
    second = PissaConfig.from_pretrained(folder / "second")
    model.load_adapter(folder / "second", "second", is_trainable=True, config=second)
    assert model.peft_config["second"] is second
    assert not second.inference_mode


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seed": 1}, "seed is 1, the adapter in .* was saved with 0"),
        ({"init": "lora"}, "init is 'lora'"),
        (
            {"quant": "nf4"},
            "quant is 'nf4'.*PissaConfig.from_pretrained\\(folder\\), in inference_mode or lora_dropout",
        ),
        ({"use_dora": True}, "use_dora is True"),
        ({"r": 8}, "r is 8"),
        ({"lora_alpha": 8}, "lora_alpha is 8"),
        ({"target_modules": ["q_proj"]}, "has no factors in the model, and rank 4 and scaling 1 in the folder"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight' is missing"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_a_configuration_of_another_adapter_is_refused(
    fields: dict[str, object], words: str, folder: Path, tiny_llama: Make
) -> None:
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match=words):
        PissaModel.from_pretrained(
            base, folder, config=dataclasses.replace(PissaConfig.from_pretrained(folder), **fields)
        )
    assert_same(base, before)


def test_a_configuration_of_peft_is_refused(folder: Path, tiny_llama: Make) -> None:
    with pytest.raises(TypeError, match=r"must be a pissa\.PissaConfig, got LoraConfig: pissa\.PissaConfig\.from_pret"):
        PissaModel.from_pretrained(tiny_llama(), folder, config=peft.LoraConfig.from_pretrained(folder))


# ---- The configuration alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_configuration_that_was_saved(form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    asked = PissaConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, **FORMS[form]
    )
    pissa.wrap(tiny_llama(), asked).save_pretrained(tmp_path)
    config = PissaConfig.from_pretrained(tmp_path)
    assert type(config) is PissaConfig
    assert config.to_dict() == asked.to_dict() | {"base_model_name_or_path": config.base_model_name_or_path}
    again = pissa.wrap(tiny_llama(), config)
    assert torch.equal(logits(again, tokens), logits(pissa.wrap(tiny_llama(), asked), tokens))
    for plain in (peft.LoraConfig.from_pretrained(tmp_path), peft.PeftConfig.from_pretrained(tmp_path)):
        assert type(plain) is peft.LoraConfig
        assert (plain.r, plain.lora_alpha, plain.rank_pattern) == (8, 12, {"v_proj": 4})


def test_a_configuration_that_was_saved_alone(tmp_path: Path) -> None:
    config = PissaConfig(r=4, target_modules=["b", "a"], quant="nf4", alpha_pattern={"a": 2})
    config.save_pretrained(tmp_path)
    assert PissaConfig.from_pretrained(str(tmp_path)) == config
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": "fast"}))
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read: .*seed"):
        PissaConfig.from_pretrained(tmp_path)


def test_the_configuration_of_something_else(tmp_path: Path) -> None:
    peft.LoraConfig(r=4).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"holds a plain PEFT adapter .* peft\.PeftConfig\.from_pretrained"):
        PissaConfig.from_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"holds no PiSSA adapter: there is no pissa\.json"):
        PissaConfig.from_pretrained(tmp_path)


# ---- The Hub ---------------------------------------------------------------------------------------------------------


def test_a_repository_in_the_cache(
    folder: Path, tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # it is named below
        HubCache(tmp_path / "cache", patch).put("user/repo", folder, branch="v1")
    found = {"revision": "v1", "cache_dir": tmp_path / "cache"}
    model = PissaModel.from_pretrained(tiny_llama(), "user/repo", **found)
    assert torch.equal(logits(model, tokens), logits(PissaModel.from_pretrained(tiny_llama(), folder), tokens))
    model.load_adapter("user/repo", "second", subfolder="second", **found)
    assert model.peft_config["second"].r == 2
    assert PissaConfig.from_pretrained("user/repo", subfolder="second", **found).r == 2
    with pytest.raises(ValueError, match=rf"snapshots.{COMMIT}.third holds no PiSSA adapter"):
        model.load_adapter("user/repo", "third", subfolder="third", **found)


def test_what_is_asked_of_the_hub(folder: Path, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, **options: object) -> str:
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"revision": "main", "token": "secret", "cache_dir": "cache", "torch_device": "cpu"}
    model = PissaModel.from_pretrained(tiny_llama(), "user/repo", **options)
    model.load_adapter("user/repo", "second", subfolder="second/", local_files_only=True)
    PissaConfig.from_pretrained("user/repo", subfolder="second")
    (folder / "second").rename(folder / "a[1]")
    PissaConfig.from_pretrained("user/repo", subfolder="a[1]")
    *_, (_, brackets) = asked
    assert fnmatch("a[1]/pissa.json", next(p for p in brackets["allow_patterns"] if p.endswith("pissa.json")))
    del asked[-1]
    options.pop("torch_device")
    names = sorted(ADAPTER_FILES)
    tensors = ["adapter_model.safetensors", "pissa.safetensors", "pissa_codes.safetensors"]
    assert names == sorted(["adapter_config.json", "pissa.json", *tensors])
    patterns = [sorted(options.pop("allow_patterns")) for _, options in asked]
    json_files = ["adapter_config.json", "pissa.json"]
    assert patterns == [names, [f"second/{name}" for name in names], [f"second/{name}" for name in json_files]]
    assert asked == [("user/repo", options), ("user/repo", {"local_files_only": True}), ("user/repo", {})]


def test_a_folder_wins(folder: Path, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user").mkdir()
    shutil.copytree(folder, tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    PissaModel.from_pretrained(tiny_llama(), "user/repo", cache_dir=tmp_path)
    PissaConfig.from_pretrained("user/repo")


@pytest.mark.parametrize(
    ("model_id", "words"),
    [("user/repo", "offline|outgoing traffic|cached"), ("./runs/one", "Repo id"), ("a b", "Repo id")],
)
def test_neither_a_folder_nor_a_repository(
    model_id: str, words: str, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, wrapped = tiny_llama(), pissa.wrap(tiny_llama(), r=4)
    before = snapshot(base), snapshot(wrapped)
    monkeypatch.chdir(tmp_path)
    looked = rf"'{model_id}' holds no PiSSA adapter: there is no such folder .*{os.path.basename(tmp_path)}.*{words}"
    for load in (
        lambda: PissaModel.from_pretrained(base, model_id, cache_dir=tmp_path),
        lambda: wrapped.load_adapter(model_id, "second", cache_dir=tmp_path),
        lambda: PissaConfig.from_pretrained(model_id, cache_dir=tmp_path),
    ):
        with pytest.raises(ValueError, match=f"(?s){looked}"):
            load()
    assert_same(base, before[0])
    assert_same(wrapped, before[1])

"""The files of an adapter's folder: which of them loading needs, what becomes of a plain LoRA that another program has
written, and what the folders of a run share."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from language_models import Make, error, logits, train
from pissa import PissaConfig, PissaModel, notices
from pissa.adapters.lora_folder import open_adapter

LORA, CODES = "adapter_model.safetensors", "pissa_codes.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def saved(make: Make, tokens: Tensor, folder: Path, **fields: object) -> PissaModel:
    model = pissa.wrap(make(), **{"r": 4, **fields})
    train(model, tokens)
    model.save_pretrained(folder)
    return model.eval()


# ---- The plain LoRA is an export -------------------------------------------------------------------------------------


def test_it_may_be_deleted(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = saved(tiny_llama, tokens, tmp_path, modules_to_save=["lm_head"])
    (tmp_path / LORA).unlink()
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), logits(model, tokens))


def test_another_program_replaces_it(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    """PEFT trains on, and saves to the same folder."""
    saved(tiny_llama, tokens, tmp_path)
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    train(plain, tokens)
    plain.save_pretrained(tmp_path)
    words = r"another program has written it.*peft\.PeftModel\.from_pretrained; or, .* delete adapter_model"
    with pytest.raises(ValueError, match=words):
        PissaModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.warns(notices.ReplacedLoraWarning, match="the folder is now the plain LoRA in it"):
        assert open_adapter(tmp_path).ours is None
    model = pissa.wrap(tiny_llama(), r=2)
    with pytest.raises(ValueError, match=words):
        model.load_adapter(tmp_path, "default")
    with pytest.warns(notices.ReplacedLoraWarning):
        model.load_adapter(tmp_path, "plain")
    model.set_adapter("plain")
    assert error(logits(model, tokens), logits(plain.eval(), tokens)) < 1e-5


# ---- LoRA's start ----------------------------------------------------------------------------------------------------


LORAS = {
    "plain": {},
    "dora": {"use_dora": True},
    "explicit, repaired": {"residual": "explicit", "repair": "pissa"},
    "quantised, repaired": {"quant": "nf4", "repair": "pissa"},
}


@pytest.mark.parametrize("fields", LORAS.values(), ids=LORAS)
def test_lora_s_start_is_saved_at_its_rank(
    fields: dict[str, object], tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """Also on a base that lacks another start. On the unmodified base, the plain LoRA lacks the error of the base's
    storage and nothing else."""
    model = saved(tiny_llama, tokens, tmp_path, init="lora", rank_pattern={"v_proj": 2}, **fields)
    tensors = load_file(tmp_path / LORA)
    assert {len(tensor) for key, tensor in tensors.items() if "lora_A" in key} == {2, 4}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    bases = [copy.deepcopy(model).unload()] + ([] if "quant" in fields else [tiny_llama()])
    for base in bases:
        plain = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert error(logits(plain, tokens), logits(model, tokens)) < 1e-5
    again = PissaModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    # What PEFT's functions hand out comes back, with the start.
    other = pissa.wrap(tiny_llama(), r=4, init="lora", rank_pattern={"v_proj": 2}, **fields)
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert error(logits(other.eval(), tokens), logits(model, tokens)) < 1e-5
    assert other.peft_config["default"].init == "lora"


# ---- The file with codes ---------------------------------------------------------------------------------------------


@pytest.fixture
def fed_back(tiny_llama: Make, tokens: Tensor) -> PissaModel:
    """A model whose codes error feedback has found."""
    calibration = [{"input_ids": tokens}]
    return pissa.wrap(tiny_llama(), r=4, quant="nf4", init="lora", error_feedback=True, calibration=calibration)


def test_the_folders_of_a_run_share_the_codes(
    fed_back: PissaModel, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    for name in ("1", "2", "2"):
        train(fed_back, tokens)
        fed_back.save_pretrained(tmp_path / name)
    assert os.path.samefile(tmp_path / "1" / CODES, tmp_path / "2" / CODES)
    assert not [path for path in (tmp_path / "2").iterdir() if path.name.startswith(".")]
    shutil.rmtree(tmp_path / "1")  # as save_total_limit removes the oldest
    fed_back.save_pretrained(tmp_path / "3")
    assert os.path.samefile(tmp_path / "2" / CODES, tmp_path / "3" / CODES)
    assert not any("codes" in key for key in load_file(tmp_path / "3" / "pissa.safetensors"))
    (tmp_path / "3").rename(tmp_path / "moved")
    assert torch.equal(
        logits(PissaModel.from_pretrained(tiny_llama(), tmp_path / "moved"), tokens), logits(fed_back, tokens)
    )


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [Path.unlink, touch], ids=["deleted", "changed"])
def test_codes_that_are_not_there_any_more_are_written_again(
    change: Callable[[Path], None], fed_back: PissaModel, tmp_path: Path
) -> None:
    fed_back.save_pretrained(tmp_path / "1")
    content = (tmp_path / "1" / CODES).read_bytes()
    change(tmp_path / "1" / CODES)
    fed_back.save_pretrained(tmp_path / "2")
    assert (tmp_path / "2" / CODES).read_bytes() == content
    assert (tmp_path / "2" / CODES).stat().st_nlink == 1


def test_a_disk_without_hard_links(fed_back: PissaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    for name in ("1", "2"):
        fed_back.save_pretrained(tmp_path / name)
    assert (tmp_path / "1" / CODES).read_bytes() == (tmp_path / "2" / CODES).read_bytes()


def save_killed(model: PissaModel, folder: Path, renamed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves until that many files have been renamed."""
    rename, calls = os.replace, []

    def killed(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) > renamed:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()


@pytest.mark.parametrize("renamed", range(5))
def test_a_kill_between_two_renames(
    renamed: int, tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adapter with a module that is trained beside the layers, and with codes, which are written again."""
    fields = {"quant": "nf4", "init": "lora", "error_feedback": True, "modules_to_save": ["lm_head"]}
    model = pissa.wrap(tiny_llama(), r=4, calibration=[{"input_ids": tokens}], **fields)
    model.save_pretrained(tmp_path)
    old = logits(model.eval(), tokens)
    touch(tmp_path / CODES)
    train(model, tokens)
    save_killed(model, tmp_path, renamed, monkeypatch)
    expected = logits(model, tokens) if renamed > 1 else old  # pissa.safetensors is the second
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), expected)


@pytest.mark.parametrize("renamed", range(4))
def test_a_kill_while_another_run_is_saved_over_it(
    renamed: int, tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(tiny_llama, tokens, tmp_path)
    new = pissa.wrap(tiny_llama(), r=2, quant="nf4")
    train(new, tokens)
    save_killed(new.eval(), tmp_path, renamed, monkeypatch)
    expected = logits(new if renamed else old, tokens)  # pissa.safetensors is the first
    assert torch.equal(logits(PissaModel.from_pretrained(tiny_llama(), tmp_path), tokens), expected)


# ---- The rest of the base --------------------------------------------------------------------------------------------

REST = ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("name", REST)
def test_another_rest_is_another_base(name: str, tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), r=4).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "pissa.json").read_text())["rest"].keys() >= set(REST)
    base = tiny_llama()
    base.get_parameter(name).data.view(-1)[-1] += 1
    with pytest.raises(ValueError, match=f"is not the base that .*: {name}, which no adapter changes, has other"):
        PissaModel.from_pretrained(base, tmp_path)
    model = pissa.wrap(base, r=4)
    with pytest.raises(ValueError, match=f"{name}, which no adapter"):
        model.load_adapter(tmp_path, "second")


def test_a_rest_that_rounds_is_said(tiny_llama: Make, tmp_path: Path) -> None:
    pissa.wrap(tiny_llama(), r=4).save_pretrained(tmp_path)
    base = tiny_llama()
    base.lm_head.to(torch.bfloat16)
    with pytest.warns(notices.OtherDtypeWarning, match=r"1 weights, lm_head\.weight the first, differ by roundings"):
        PissaModel.from_pretrained(base, tmp_path)


def test_what_is_trained_is_no_part_of_the_rest(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = pissa.wrap(tiny_llama(), r=4, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    model.base_model.model.model.norm.weight.requires_grad_(True)
    train(model, tokens)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert not json.loads((tmp_path / "pissa.json").read_text())["rest"].keys() & set(REST)
    PissaModel.from_pretrained(tiny_llama(), tmp_path)


class Normalised(nn.Module):
    """Statistics of batches change in a training. Buffers that no state dict has are computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("computed", torch.rand(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def test_buffers_of_the_rest(tmp_path: Path) -> None:
    model = pissa.wrap(Normalised(), PissaConfig(r=2, target_modules=["linear"]))
    model.train()(torch.randn(4, 8))
    model.save_pretrained(tmp_path)
    rest = json.loads((tmp_path / "pissa.json").read_text())["rest"]
    assert sorted(rest) == ["kept", "linear.bias", "norm.bias", "norm.weight"]
    PissaModel.from_pretrained(Normalised(), tmp_path)

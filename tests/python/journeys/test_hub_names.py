"""A repository of the Hub is used by its name: what is computed is that of its files, and what is saved names it."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa
import runs
from checkpoint_folders import tensors_of
from hub_cache import HubCache
from language_models import error, logits, train
from lora_files import CLOSE
from pissa.base.weights import CodedLinear
from pissa.cli import main
from released_folders import release

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def finetune(model: Path | str, data: Path, out: Path) -> None:
    assert main(runs.command("finetune", Path(model), data, out, steps=2)) == 0


def names(folder: Path, name: str, cache: Path) -> None:
    """Checks that an adapter's files name the model so, and none of them a place on this machine."""
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    assert json.loads((folder / "pissa.json").read_text())["config"]["base_model_name_or_path"] == name
    assert f"base_model: {name}\n" in (folder / "README.md").read_text()
    for path in folder.iterdir():
        assert not path.is_file() or str(cache).encode() not in path.read_bytes(), path


def same_numbers(first: Path, second: Path) -> None:
    """Checks that the tensors of two adapters are the same. Their files may name the model differently."""
    expected, found = tensors_of(first), tensors_of(second)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def released(base: Path, folder: Path) -> Path:
    """The model in FP8."""
    shutil.copytree(base, folder)
    release(AutoModelForCausalLM.from_pretrained(base), "fp8-tiles", folder)
    return folder


def test_a_released_model_is_trained_on_its_codes(
    base: Path, data: Path, hub: HubCache, tokens: Tensor, tmp_path: Path
) -> None:
    folder = released(base, tmp_path / "fp8")
    name = hub.put("org/fp8", folder)
    models = [pissa.load(model, r=4, init="lora") for model in (folder, name)]
    assert {module.format for module in models[1].modules() if isinstance(module, CodedLinear)} == {"fp8"}
    assert torch.equal(logits(models[1], tokens), logits(models[0], tokens))
    models[1].save_pretrained(tmp_path / "saved")
    names(tmp_path / "saved", name, hub.path)
    for model, out in ((folder, tmp_path / "by folder"), (name, tmp_path / "by name")):
        finetune(model, data, out)
    same_numbers(tmp_path / "by folder", tmp_path / "by name")
    names(tmp_path / "by name", name, hub.path)


def test_residuals_are_trained_as_in_their_folder(
    base: Path, data: Path, hub: HubCache, tokens: Tensor, tmp_path: Path
) -> None:
    """The model that the adapter is for is the one that was split, by whatever name it had."""
    dense = hub.put("org/dense", base)
    assert main(["init", dense, str(tmp_path / "split"), "--rank", "4", "--quant", "nf4"]) == 0
    name = hub.put("org/split", tmp_path / "split")
    models = [pissa.load(model) for model in (tmp_path / "split", name)]
    assert torch.equal(logits(models[1], tokens), logits(models[0], tokens))
    for model, out in ((tmp_path / "split", tmp_path / "by folder"), (name, tmp_path / "by name")):
        finetune(model, data, out)
    same_numbers(tmp_path / "by folder", tmp_path / "by name")
    names(tmp_path / "by name", dense, hub.path)


def test_a_model_that_is_split_by_its_name_keeps_it(
    base: Path, hub: HubCache, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So another machine finds it: here, another working directory."""
    name = hub.put("org/dense", base)
    (tmp_path / "home").mkdir()
    with monkeypatch.context() as there:
        there.chdir(tmp_path / "home")
        assert main(["init", name, "split", "--rank", "4"]) == 0
        model = pissa.load("split")
        train(model, tokens)
        model.save_pretrained("run")
    run = shutil.move(tmp_path / "home" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "home")
    names(run, name, hub.path)
    expected = logits(model.eval(), tokens)
    again = pissa.PissaModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), run)
    assert torch.equal(logits(again, tokens), expected)
    assert error(logits(AutoPeftModelForCausalLM.from_pretrained(run), tokens), expected) < CLOSE
    assert main(["merge", str(run), str(tmp_path / "merged"), "--base", name]) == 0
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens), expected) < CLOSE


class FakeHub:
    """One repository of the Hub, of which it notes what is fetched."""

    def __init__(self, repository: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.here = repository, here
        self.fetched: set[str] = set()
        for name in ("snapshot_download", "hf_hub_download"):
            monkeypatch.setattr(f"huggingface_hub.{name}", getattr(self, name))

    def snapshot_download(
        self,
        repo_id: str,
        *,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        **_: Any,
    ) -> str:
        for path in self.repository.rglob("*"):
            name = path.relative_to(self.repository).as_posix()
            wanted = allow_patterns is None or _matches(name, allow_patterns)
            if path.is_file() and wanted and not _matches(name, ignore_patterns or []):
                self.hf_hub_download(repo_id, name)
        return str(self.here)

    def hf_hub_download(self, repo_id: str, filename: str, **_: Any) -> str:
        if not (self.repository / filename).is_file():
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError(f"{repo_id} has no {filename}")
        self.fetched.add(filename)
        (self.here / filename).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(self.repository / filename, self.here / filename))


def _matches(name: str, patterns: list[str] | str) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


@pytest.mark.parametrize("shards", ["20KB", "5GB"])
def test_the_weights_are_fetched_once(
    shards: str, base: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's repositories hold them again for other programs, beside those of the index."""
    repository = tmp_path / "repository"
    shutil.copytree(base, repository, ignore=lambda _, files: [file for file in files if "safetensors" in file])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(repository, max_shard_size=shards)
    needed = {path.name for path in repository.iterdir()}
    assert any(name.startswith("model-00002-of-") for name in needed) == (shards == "20KB")
    for name in ("consolidated.safetensors", "consolidated.00.pth", "pytorch_model.bin", "params.json"):
        (repository / name).write_bytes(b"{}")
    hub = FakeHub(repository, tmp_path / "here", monkeypatch)
    loaded = pissa.load("mistralai/Tiny", r=4)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert {name for name in hub.fetched if "safetensors" in name} == {name for name in needed if "safetensors" in name}
    assert not [name for name in hub.fetched if name.endswith((".bin", ".pth"))]

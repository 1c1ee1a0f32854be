"""What a model's folder contains, and what is written into it about that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import pissa
from checkpoint_folders import save
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge
from pissa.containers.checkpoint import RESIDUAL_KEY, Checkpoint, Contents, ModelFolder

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    save("llama", folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return fields


def test_a_folder_says_what_it_contains(base: Path, tmp_path: Path) -> None:
    assert ModelFolder.open(base).contents is Contents.DENSE
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits).save_pretrained(tmp_path / "packed")
    packed, dense = Checkpoint.open(tmp_path / "packed"), Checkpoint.open(base)
    assert packed.contents is Contents.BITSANDBYTES
    assert set(packed.names) == set(dense.names)
    assert all(packed.entry(name)[:2] == dense.entry(name)[:2] for name in dense.names)
    assert packed.coded.keys() == {f"{name}.weight" for name in packed.coded_layers}
    init(base, tmp_path / "split", pissa.PissaConfig(r=4))
    assert ModelFolder.open(tmp_path / "split").contents is Contents.RESIDUAL
    (tmp_path / "split" / "pissa.json").unlink()
    assert ModelFolder.open(tmp_path / "split").contents is Contents.RESIDUAL
    config = {name: value for name, value in config_of(tmp_path / "split").items() if name != RESIDUAL_KEY}
    (tmp_path / "split" / "config.json").write_text(json.dumps(config))  # as the paper's authors publish theirs
    assert ModelFolder.open(tmp_path / "split").contents is Contents.PEFT_RESIDUAL
    with pytest.raises(
        ValueError, match=r"a residual, whose initial adapter is in pissa_init; .*subfolder='pissa_init'"
    ):
        pissa.load(tmp_path / "split", r=4)


@pytest.mark.parametrize(("method", "is_marked"), [("pissa", True), ("lora", False)])
def test_a_checkpoint_that_lacks_a_start_is_marked(method: Any, is_marked: bool, base: Path, tmp_path: Path) -> None:
    init(base, tmp_path / "split", pissa.PissaConfig(r=4, init=method, quant="nf4"))
    assert (RESIDUAL_KEY in config_of(tmp_path / "split")) == is_marked
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "split")
    if is_marked:
        with pytest.raises(ValueError, match=r"split is a residual of `pissa init`.*pissa\.load\(folder\)"):
            pissa.wrap(model, r=4)
    else:
        pissa.wrap(model, r=4)


def test_the_mark_goes_with_what_was_lacking(base: Path, tmp_path: Path) -> None:
    init(base, tmp_path / "split", pissa.PissaConfig(r=4, quant="nf4"))
    model = pissa.load(tmp_path / "split")
    model.save_pretrained(tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "split", tmp_path / "merged")
    pissa.export(tmp_path / "run", tmp_path / "exported", to="bnb4", base=tmp_path / "split")
    assert RESIDUAL_KEY not in config_of(tmp_path / "merged")
    assert config_of(tmp_path / "exported")[RESIDUAL_KEY]
    merge(tmp_path / "exported" / "adapter", tmp_path / "exported", tmp_path / "again")
    assert RESIDUAL_KEY not in config_of(tmp_path / "again")
    assert not hasattr(model.merge_and_unload().config, RESIDUAL_KEY)

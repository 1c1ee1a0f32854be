"""What an adapter was trained on, by what it names as its base: a residual, or the model that is unmodified."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import pissa
from hub_cache import HubCache
from language_models import Make, error
from lora_files import CLOSE, config_of
from peft_adapters import Trained, plain_logits, train_on_residual
from pissa import notices
from pissa.checkpoints.merge import merge

ON_RESIDUAL = "an adapter on a residual, and its initial adapter"


@pytest.fixture
def trained(tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> Trained:
    """An adapter that PEFT has trained on a residual; the unmodified model is in "base"."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return train_on_residual(tiny_llama, tokens, tmp_path)


def rename(adapter: Path, base: str | Path | None) -> None:
    """Lets the adapter name another base."""
    config = config_of(adapter) | {"base_model_name_or_path": None if base is None else str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


WRITES: dict[str, Callable[..., Any]] = {
    "convert": lambda adapter, out, **options: pissa.convert(adapter, out, rank=8, **options).layout,
    "vllm": lambda adapter, out, **options: pissa.export(adapter, out, "vllm", **options).what,
}


@pytest.mark.parametrize("elsewhere", ["/elsewhere/split", "./split", "runs/of/split"])
@pytest.mark.parametrize("write", WRITES)
def test_a_folder_elsewhere_may_be_a_residual(write: str, elsewhere: str, trained: Trained, tmp_path: Path) -> None:
    rename(trained.adapter, elsewhere)
    out, adapter = tmp_path / "out", trained.adapter
    for options in ({}, {"base": "/nor/here"}):
        named = re.escape(options.get("base", elsewhere))
        with pytest.raises(ValueError, match=rf"was trained on {named}, which is not here and may be a residual\."):
            WRITES[write](adapter, out, **options)
    assert not out.exists()
    assert WRITES[write](adapter, tmp_path / "a", base=trained.initial) == ON_RESIDUAL
    with pytest.warns(notices.UnseenBaseWarning, match=re.escape(f"If {elsewhere} is a residual, the change is wrong")):
        assert WRITES[write](adapter, tmp_path / "c", base=tmp_path / "base") == "a plain LoRA"


def test_a_merge_with_another_base_than_the_one_elsewhere(trained: Trained, tmp_path: Path) -> None:
    rename(trained.adapter, "/elsewhere/split")
    with pytest.warns(notices.UnseenBaseWarning, match="It is taken for a LoRA that was trained on .*base"):
        merge(trained.adapter, tmp_path / "base", tmp_path / "out")
    pissa.convert(trained.adapter, tmp_path / "lora", base=tmp_path / "base", initial=trained.initial)
    merge(tmp_path / "lora", tmp_path / "base", tmp_path / "a")


@pytest.mark.parametrize("name", ["org/model", "model", None])
def test_a_name_on_the_hub_is_not_looked_up(name: str | None, trained: Trained, tmp_path: Path) -> None:
    rename(trained.adapter, name)
    for write in ("convert", "vllm"):
        assert WRITES[write](trained.adapter, tmp_path / write) == "a plain LoRA"
        assert config_of(tmp_path / write)["base_model_name_or_path"] == name


def test_a_residual_in_the_cache_of_the_hub_is_one(
    trained: Trained, tiny_llama: Make, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename(trained.adapter, HubCache(tmp_path / "cache", monkeypatch).put("org/split", trained.initial))
    for write in ("convert", "vllm"):
        assert WRITES[write](trained.adapter, tmp_path / write) == ON_RESIDUAL
        assert config_of(tmp_path / write)["base_model_name_or_path"] is None  # what has been split is not known
        assert error(plain_logits(tiny_llama(), tmp_path / write, tokens), trained.logits) < CLOSE

"""Folders that a CPU and a GPU have written (fixtures/format_2/make.py); either knows them by their fingerprints. And
folders with the fields that came later (make_stored.py)."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pissa
from cuda_stand_in import CudaStandIn
from language_models import assert_same, error, logits, snapshot
from pissa import PissaModel

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
    # Another instruction set than that of make.py may round some scales otherwise: see test_format_1.
    pytest.mark.filterwarnings("ignore::pissa.notices.OtherRoundingWarning"),
]

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENS = torch.arange(18).reshape(2, 9)
kinds = pytest.mark.parametrize("kind", ["xxh3", "sums"])
devices = pytest.mark.parametrize("device", ["cpu", "cuda"])
LOGITS = (2 * 8 + 2) * 40 * 2.0**-24  # derived in test_format_1
CONFIG: dict[str, Any] = {"r": 2, "quant": "nf4", "target_modules": ["q_proj", "down_proj"]}


def base() -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(FIXTURES / "format_1" / "base", dtype=torch.float32).eval()


class On:
    """One of the two devices."""

    def __init__(self, device: str) -> None:
        self.gpu = CudaStandIn() if device == "cuda" else None
        self.block: Any = contextlib.nullcontext() if self.gpu is None else self.gpu

    def put(self, value: Any) -> Any:
        return value if self.gpu is None else self.gpu.put(value)

    def logits(self, model: nn.Module) -> torch.Tensor:
        return logits(model, self.put(TOKENS)).cpu()


def fingerprints(folder: Path) -> set[str]:
    layers = json.loads((folder / "pissa.json").read_text())["layers"].values()
    return {layer[name] for layer in layers for name in ("weight", "stored") if layer[name] is not None}


@kinds
@devices
def test_it_is_loaded_and_saved_with_what_it_is_known_by(kind: str, device: str, tmp_path: Path) -> None:
    on, folder = On(device), FIXTURES / "format_2" / kind
    expected = logits(PissaModel.from_pretrained(base(), FIXTURES / "format_2" / "xxh3"), TOKENS)
    with on.block:
        model = PissaModel.from_pretrained(on.put(base()), folder)
        assert torch.equal(on.logits(model), expected)
        model.save_pretrained(tmp_path)
    assert {found[:5] for found in fingerprints(folder)} == {f"{kind}:"}
    if pissa.ops.build_info()["isa"] != "baseline":
        assert fingerprints(tmp_path) == fingerprints(folder)


@kinds
@devices
def test_a_stored_base_takes_it_if_its_residual_is_the_same(kind: str, device: str) -> None:
    """Of the dense weight, which is gone, the base knows one kind only."""
    on, folder = On(device), FIXTURES / "format_2" / kind
    with on.block:
        model = pissa.wrap(on.put(base()), **CONFIG)
        if pissa.ops.build_info()["isa"] != "baseline":
            model.load_adapter(folder, "second")
        other = base()
        other.model.layers[1].mlp.down_proj.weight.data[3, 5] *= 3
        model = pissa.wrap(on.put(other), **CONFIG)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj"):
            model.load_adapter(folder, "second")
        assert_same(model, before)


@kinds
@devices
def test_another_base_is_refused(kind: str, device: str) -> None:
    on, other = On(device), base()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] *= 1 + 2.0**-23
    with on.block:
        other = on.put(other)
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"first layer that differs is model\.layers\.1\.mlp\.down_proj"):
            PissaModel.from_pretrained(other, FIXTURES / "format_2" / kind)
        assert_same(other, before)


@pytest.mark.parametrize("kind", ["taken", "unit"])
def test_a_residual_that_lacks_other_factors_is_made_again(kind: str) -> None:
    recorded = load_file(FIXTURES / "format_2" / f"{kind}.safetensors")
    model = PissaModel.from_pretrained(base(), FIXTURES / "format_2" / kind)
    assert error(logits(model, recorded["tokens"]), recorded["logits"]) <= LOGITS
    assert error(logits(base(), recorded["tokens"]), recorded["logits"]) > 1000 * LOGITS
    layer = json.loads((FIXTURES / "format_2" / kind / "pissa.json").read_text())["layers"].popitem()[1]
    assert layer["taken" if kind == "taken" else "base"]  # what the folder is kept for

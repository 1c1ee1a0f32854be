"""Adapters that pissa 0.1.0 wrote (fixtures/format_1/make.py) load to the bit, whatever the code has become, on a CPU
and on a GPU, which know them by fingerprints of either kind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from cuda_stand_in import CudaStandIn
from language_models import assert_same, error, logits, snapshot
from pissa import PissaConfig, PissaModel, config, notices
from pissa.base.stored import QuantizedLinear
from pissa.files import config_json
from pissa.layers.layer import PissaLayer

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
    pytest.mark.filterwarnings("ignore::pissa.notices.OtherRoundingWarning"),
]

FOLDER = Path(__file__).parents[1] / "fixtures" / "format_1"
OWN = {field.name for field in dataclasses.fields(PissaConfig)} - {f.name for f in dataclasses.fields(peft.LoraConfig)}
all_of_them = pytest.mark.parametrize("name", ["implicit", "nf4", "taken", "unit", "sums"])
stored = pytest.mark.parametrize("name", ["nf4", "sums"])
devices = pytest.mark.parametrize("device", ["cpu", "cuda"])

# The logits are behind two layers of eight stages (norm, projections, scores, what they weigh, output; norm, the two
# products, down) and a norm and the head. None sums more than 40 terms, so that none adds a relative error of more than
# 40 roundoffs, and none makes it larger: normalised inputs, and a sum with the residual stream. Measured: 3.8e-7.
LOGITS = (2 * 8 + 2) * 40 * 2.0**-24


def base() -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32).eval()


def record(folder: Path) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = json.loads((folder / "pissa.json").read_text())["layers"]
    return layers


def in_memory(layer: PissaLayer) -> dict[str, Tensor]:
    """What make.py recorded of a layer."""
    start, deltas, residual = layer.start_of("default"), layer.deltas("default"), {}
    if isinstance(layer.base_layer, QuantizedLinear):
        residual = layer.base_layer.quantized.tensors()
    return {"a0": start.a0, "b0": start.b0, "da": deltas.a, "db": deltas.b, **residual}


class On:
    """One of the two devices."""

    def __init__(self, device: str) -> None:
        self.gpu = CudaStandIn() if device == "cuda" else None
        self.block: Any = contextlib.nullcontext() if self.gpu is None else self.gpu

    def put(self, value: Any) -> Any:
        return value if self.gpu is None else self.gpu.put(value)

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return logits(model, self.put(tokens)).cpu()


@all_of_them
def test_loads_to_the_bit(name: str) -> None:
    expected = load_file(FOLDER / f"{name}.safetensors")
    tokens, trained = expected.pop("tokens"), expected.pop("logits")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PissaModel.from_pretrained(base(), FOLDER / name)
    said = [str(warning.message) for warning in caught if warning.category is notices.OtherRoundingWarning]
    rounded = 0
    for key, tensor in expected.items():
        layer, _, part = key.rpartition(".")
        found = in_memory(model.base_model.model.get_submodule(layer))[part]
        if not torch.equal(found, tensor):
            rounded += 1
            # The files hold the factors; the residual is computed, with fused multiply-adds from AVX2 on. Without them
            # the scales may differ, by roundoffs of the largest elements that they are made of.
            assert part in ("absmax", "nested_absmax", "offset"), key
            largest = float(expected.get(f"{layer}.offset", tensor.abs().max()))
            assert torch.allclose(found, tensor, rtol=0, atol=4 * 2.0**-24 * largest), key
    assert bool(said) == bool(rounded)
    assert not rounded or pissa.ops.build_info()["isa"] == "baseline"
    assert error(logits(model, tokens), trained) <= LOGITS
    assert error(logits(base(), tokens), trained) > 1000 * LOGITS


def test_the_fixtures_have_what_they_are_kept_for() -> None:
    assert all(layer["taken"] for layer in record(FOLDER / "taken").values())
    assert all(layer["base"] for layer in record(FOLDER / "unit").values())
    for name, kind in (("nf4", "xxh3"), ("sums", "sums")):
        for layer in record(FOLDER / name).values():
            assert layer["weight"].startswith(f"{kind}:float32:")
            assert layer["stored"].startswith(f"{kind}:uint8:")


@all_of_them
def test_it_is_read_under_a_peft_that_lacks_fields(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    under_021 = PissaConfig.from_pretrained(FOLDER / name)
    used = config._SUPPORTED | OWN | {"init_lora_weights"}
    lacking = [field for field in config_json._config_fields() if field.name in used]
    assert len(lacking) < len(config_json._config_fields())
    monkeypatch.setattr(config_json, "_config_fields", lambda: lacking)
    assert PissaConfig.from_pretrained(FOLDER / name) == under_021


@stored
@devices
def test_it_is_loaded_and_saved_with_the_fingerprints_that_it_had(name: str, device: str, tmp_path: Path) -> None:
    on, tokens = On(device), torch.arange(18).reshape(2, 9)
    expected = logits(PissaModel.from_pretrained(base(), FOLDER / name), tokens)
    with on.block:
        model = PissaModel.from_pretrained(on.put(base()), FOLDER / name)
        assert torch.equal(on.logits(model, tokens), expected)
        model.save_pretrained(tmp_path)
    if pissa.ops.build_info()["isa"] != "baseline":
        assert record(tmp_path) == record(FOLDER / name)


@stored
@devices
def test_a_stored_base_takes_it_if_its_residual_is_the_same(name: str, device: str) -> None:
    """Of the dense weight, which is gone, the base knows one fingerprint only."""
    on, options = On(device), PissaConfig.from_pretrained(FOLDER / name)
    with on.block:
        model = pissa.wrap(on.put(base()), options)
        if pissa.ops.build_info()["isa"] != "baseline":
            model.load_adapter(FOLDER / name, "second")
        other = base()
        other.model.layers[1].mlp.down_proj.weight.data[3, 5] *= 3
        model = pissa.wrap(on.put(other), options)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj"):
            model.load_adapter(FOLDER / name, "second")
        assert_same(model, before)


@all_of_them
@devices
def test_another_base_is_refused(name: str, device: str) -> None:
    on, other = On(device), base()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] *= 1 + 2.0**-23
    with on.block:
        other = on.put(other)
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"first layer that differs is model\.layers\.1\.mlp\.down_proj"):
            PissaModel.from_pretrained(other, FOLDER / name)
        assert_same(other, before)

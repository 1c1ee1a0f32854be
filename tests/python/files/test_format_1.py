"""Adapters that pissa 0.1.0 wrote (fixtures/format_1/make.py) load to the bit, whatever the code has become."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from language_models import assert_same, error, logits, snapshot
from pissa import PissaConfig, PissaModel, config, notices
from pissa.base.stored import QuantizedLinear
from pissa.files import config_json
from pissa.layers.layer import PissaLayer

pytestmark = pytest.mark.cpu_only

FOLDER = Path(__file__).parents[1] / "fixtures" / "format_1"
OWN = {field.name for field in dataclasses.fields(PissaConfig)} - {f.name for f in dataclasses.fields(peft.LoraConfig)}
both = pytest.mark.parametrize("form", ["implicit", "nf4"])

# The logits are behind two layers of eight stages (norm, projections, scores, what they weigh, output; norm, the two
# products, down) and a norm and the head. None sums more than 40 terms, so that none adds a relative error of more than
# 40 roundoffs, and none makes it larger: normalised inputs, and a sum with the residual stream. Measured: 3.8e-7.
LOGITS = (2 * 8 + 2) * 40 * 2.0**-24


def base() -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32).eval()


def in_memory(layer: PissaLayer) -> dict[str, Tensor]:
    """What make.py recorded of a layer."""
    start, deltas, residual = layer.start_of("default"), layer.deltas("default"), {}
    if isinstance(layer.base_layer, QuantizedLinear):
        residual = layer.base_layer.quantized._asdict()
    return {"a0": start.a0, "b0": start.b0, "da": deltas.a, "db": deltas.b, **residual}


@both
def test_loads_to_the_bit(form: str) -> None:
    expected = load_file(FOLDER / f"{form}.safetensors")
    tokens, trained = expected.pop("tokens"), expected.pop("logits")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PissaModel.from_pretrained(base(), FOLDER / form)
    said = [str(warning.message) for warning in caught if warning.category is notices.OtherRoundingWarning]
    rounded = 0
    for key, tensor in expected.items():
        name, _, part = key.rpartition(".")
        found = in_memory(model.base_model.model.get_submodule(name))[part]
        if not torch.equal(found, tensor):
            rounded += 1
            # The files hold the factors; the residual is computed, with fused multiply-adds from AVX2 on. Without them
            # the scales may differ, by roundoffs of the largest elements that they are made of.
            assert part in ("nested_absmax", "offset"), key
            assert torch.allclose(found, tensor, rtol=0, atol=4 * 2.0**-24 * float(expected[f"{name}.offset"])), key
    assert bool(said) == bool(rounded)
    assert not rounded or pissa.ops.build_info()["isa"] == "baseline"
    assert error(logits(model, tokens), trained) <= LOGITS
    assert error(logits(base(), tokens), trained) > 1000 * LOGITS


@both
def test_it_is_read_under_a_peft_that_lacks_fields(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pissa 0.1.0 wrote all fields of PEFT 0.21, most of which it has no use for."""
    under_021 = PissaConfig.from_pretrained(FOLDER / form)
    used = config._SUPPORTED | OWN | {"init_lora_weights"}
    lacking = [field for field in config_json._config_fields() if field.name in used]
    assert len(lacking) < len(config_json._config_fields())
    monkeypatch.setattr(config_json, "_config_fields", lambda: lacking)
    assert PissaConfig.from_pretrained(FOLDER / form) == under_021


@both
def test_another_base_is_refused(form: str) -> None:
    other = base()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] *= 1 + 2.0**-23
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"first layer that differs is model\.layers\.1\.mlp\.up_proj"):
        PissaModel.from_pretrained(other, FOLDER / form)
    assert_same(other, before)

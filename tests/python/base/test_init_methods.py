"""The registry of init methods, and what of a configuration tells one start from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import one_weight
import pissa
from language_models import Make, logits, train
from pissa import PissaConfig, PissaModel, ops
from pissa.layers.layer import pissa_layers

Q = "model.layers.0.self_attn.q_proj"
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


class Rows(pissa.InitMethod):
    """The first rows of the weight."""

    name = "rows"
    fields = ("seed",)

    def start(self, task: pissa.StartTask) -> list[pissa.StartFactors]:
        pairs = zip(task.weights, task.origins, strict=True)
        return [
            pissa.StartFactors(weight[: origin.r].float(), torch.eye(len(weight), origin.r), origin)
            for weight, origin in pairs
        ]


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "fields", [{"init": "rows"}, {"init": "rows", "quant": "nf4"}, {"repair": "rows", "quant": "nf4"}]
)
def test_a_start_of_one_s_own(
    fields: dict[str, Any], small_llama: Make, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"got 'rows'; allowed: .*'pissa'"):
        PissaConfig(**fields)
    monkeypatch.setitem(pissa.INIT_METHODS, "rows", Rows())
    model = pissa.wrap(small_llama(), r=4, **fields)
    layer, weight = pissa_layers(model.base_model.model)[Q], small_llama().get_submodule(Q).weight
    start = layer.base.start if "repair" in fields else layer.start_of("default")
    assert torch.equal(start.a0, weight[:4])
    assert start.origin.identity == (("seed", 0),)
    train(model, tokens)
    model.save_pretrained(tmp_path)
    again = PissaModel.from_pretrained(small_llama(), tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    monkeypatch.delitem(pissa.INIT_METHODS, "rows")
    with pytest.raises(ValueError, match=r"pissa\.safetensors cannot be read: .*'rows'; .*pissa\.INIT_METHODS first"):
        PissaModel.from_pretrained(small_llama(), tmp_path)


def test_alternations_are_no_part_of_a_start_beside_them(small_llama: Make, tokens: torch.Tensor) -> None:
    """They are the residual's, of which it is not a part."""
    fields = {"r": 4, "target_modules": ["q_proj"]}
    alternated, calibration = {"quant": "nf4", "quant_iters": 2}, [{"input_ids": tokens}]
    model = pissa.wrap(small_llama(), repair="activations", calibration=calibration, **alternated, **fields)
    model.add_adapter("plain", PissaConfig(**fields))
    model.add_adapter("of the base", PissaConfig(init="activations", **alternated, **fields))
    layer = pissa_layers(model.base_model.model)[Q]
    assert layer.start_of("plain") is layer.start_of("default")
    assert layer.start_of("default").recipe_rank is None
    assert layer.start_of("of the base") is layer.base.start
    assert layer.base.start.recipe_rank == 4


def test_alternations_are_part_of_a_start(small_llama: Make) -> None:
    """They are a residual's: another adapter shares what they have found, or starts in the base function."""
    fields = {"r": 4, "target_modules": ["q_proj"]}
    model = pissa.wrap(small_llama(), quant="nf4", quant_iters=2, **fields)
    model.add_adapter("same", model.peft_config["default"])
    model.add_adapter("plain", PissaConfig(**fields))
    model.add_adapter("rank", PissaConfig(**{**fields, "r": 2}, quant="nf4", quant_iters=2))
    layer = pissa_layers(model.base_model.model)[Q]
    start, matrix = layer.start_of("default"), layer.base.matrix()
    assert layer.start_of("same") is start is layer.base.start
    assert start.recipe_rank == 4
    for name, r in (("plain", 4), ("rank", 2)):
        split = one_weight.split(matrix, r)
        assert torch.equal(layer.start_of(name).a0, split.a0), name
        assert layer.start_of(name).recipe_rank is None
    weight, (a, b) = small_llama().get_submodule(Q).weight, start.recipe
    [quantised] = ops.residual_many([weight], [a], [b], [1.0], form="nf4")
    assert torch.equal(layer.base.residual.codes, quantised.codes)


@pytest.mark.filterwarnings("ignore::pissa.notices.TiedWeightWarning")
@pytest.mark.parametrize("fields", [{"quant_iters": 2}, {"repair": "lora"}])
def test_a_tied_weight_has_nothing_to_repair(fields: dict[str, object], small_llama: Make, tmp_path: Path) -> None:
    base = small_llama(tie_word_embeddings=True)
    split = one_weight.split(base.lm_head.weight, 4)
    model = pissa.wrap(base, r=4, quant="nf4", target_modules=["lm_head", "q_proj"], **fields)
    layers = pissa_layers(model.base_model.model)
    assert torch.equal(layers["lm_head"].start_of("default").a0, split.a0)
    assert layers["lm_head"].base.start is None
    assert layers[Q].base.start is not None
    model.save_pretrained(tmp_path)
    again = pissa_layers(PissaModel.from_pretrained(small_llama(tie_word_embeddings=True), tmp_path).base_model.model)
    for name, layer in layers.items():
        assert torch.equal(layer.base.matrix(), again[name].base.matrix())
        assert torch.equal(layer.start_of("default").b0, again[name].start_of("default").b0)


@pytest.mark.parametrize(("init", "iters"), [("pissa", 1), ("activations", 1), ("pissa", 2), ("activations", 2)])
def test_the_origin_of_a_stored_base_is_restored(
    init: str, iters: int, small_llama: Make, tokens: torch.Tensor, tmp_path: Path
) -> None:
    fields = {"quant": "nf4", "double_quant": False, "quant_iters": iters}
    targets = {"target_modules": ["q_proj"]}
    calibration = [{"input_ids": tokens}] if init == "activations" else None
    model = pissa.wrap(small_llama(), r=4, init=init, calibration=calibration, **fields, **targets)
    model.add_adapter("second", PissaConfig(r=2, **targets))
    model.save_pretrained(tmp_path)
    path = tmp_path / "second" / "pissa.json"
    written = json.loads(path.read_text())["layers"][Q]["base"]
    if iters == 1:
        del fields["quant_iters"]
    identity = fields if init != "pissa" or iters > 1 else {}
    always = {"r", "scaling", "seed", "init"}
    assert written == {name: written[name] for name in always} | identity
    again = PissaModel.from_pretrained(small_llama(), tmp_path / "second", adapter_name="second")
    bases = [pissa_layers(loaded.base_model.model)[Q].base for loaded in (model, again)]
    assert bases[0].start.origin == bases[1].start.origin

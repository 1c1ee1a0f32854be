"""Any start on any stored base: the residual lacks the start of one method, the adapter starts by another. The base
function depends on the first alone."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import pissa
from damage import write_marked
from devices import fetch, put
from language_models import error
from mapped_files import read_tensors
from one_layer import OneLayer, adapted, filled
from oracle import assert_papers_function, base64, change64, change_a_little, deltas64
from pissa import ops
from pissa.base.init_methods import INIT_METHODS
from pissa.base.stored import residual_tensors
from pissa.model.calibration import Calibration

pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")

IN, OUT, R = 48, 40, 4
METHODS = [name for name in INIT_METHODS if name != "given"]
STARTS = {name: {"init": name} for name in METHODS}
FORMS = {"nf4": {"quant": "nf4"}, "int8": {"quant": "int8"}, "explicit": {"residual": "explicit"}}
CASES = [(form, repair, 1) for form in FORMS for repair in METHODS if (form, repair) != ("explicit", "activations")]
CASES += [(form, repair, 2) for form in ("nf4", "int8") for repair in ("pissa", "activations")]
# Each method once as the start and once as what the residual lacks; a start that alternations have found, and another.
LIVES = [(form, one, 1, other) for form in FORMS for one, other in zip(METHODS, METHODS[1:] + METHODS[:1], strict=True)]
LIVES = [life for life in LIVES if life[0] != "explicit" or "activations" not in life]
LIVES += [(form, "lora", 1, "pissa") for form in FORMS]
ALTERNATED = [case for case in CASES if case[2] > 1]
LIVES += [(form, repair, iters, start) for form, repair, iters in ALTERNATED for start in (repair, "lora")]
every_base = pytest.mark.parametrize(("form", "repair", "iters"), CASES)


def base() -> nn.Module:
    return put(OneLayer(filled(nn.Linear(IN, OUT))))


def inputs() -> Tensor:
    return put(torch.randn(5, IN, generator=torch.Generator().manual_seed(7)))


def inputs_moment() -> Tensor:
    x = torch.randn(2 * IN, IN, generator=torch.Generator().manual_seed(8)) * torch.linspace(0.5, 2, IN)
    return x.mT @ x / len(x)


def wrapped(form: str, repair: str, iters: int, start: str) -> nn.Module:
    fields = {"quant_iters": iters, "lora_alpha": 3, "target_modules": ["proj"]}
    if "activations" in (repair, start):
        fields["calibration"] = Calibration({"proj": put(inputs_moment())}, 1)
    return pissa.wrap(base(), r=R, repair=repair, **STARTS[start], **FORMS[form], **fields)


def starts(form: str) -> list[str]:
    return [start for start in STARTS if "quant" in FORMS[form] or start != "activations"]


def kept(model: nn.Module) -> list[Tensor]:
    """Everything that determines the base function, and what its residual lacks."""
    layer = adapted(model).base
    return [*residual_tensors(layer.residual).values(), *layer.start.buffers()]


@every_base
def test_the_base_is_the_same_for_every_start(form: str, repair: str, iters: int) -> None:
    own, x = wrapped(form, repair, iters, start=repair), inputs()
    for name in starts(form):
        model = wrapped(form, repair, iters, name)
        layer = adapted(model)
        assert all(map(torch.equal, kept(model), kept(own)))
        with torch.no_grad():
            at_start = model(x)
            with model.disable_adapter():
                assert torch.equal(model(x), at_start)
            assert torch.equal(own(x), at_start)
        start = layer.start_of("default")
        assert (start is layer.base.start) == (name == repair)
        if name != repair:  # found in the dense weight
            alone = adapted(wrapped(form, STARTS[name]["init"], 1, name)).start_of("default")
            assert torch.equal(start.a0, alone.a0)
            assert torch.equal(start.b0, alone.b0)
        if start.b0.any():  # else A has no gradient yet
            assert_papers_function(model, x)
            model.zero_grad()
        change_a_little(layer)
        assert_papers_function(model, x)


@pytest.mark.parametrize("form", FORMS)
def test_lora_s_start_takes_nothing_out(form: str) -> None:
    """PiSSA's then stands on the plain weight in that format."""
    weight, kept = base().proj.weight.detach(), adapted(wrapped(form, "lora", 1, "pissa")).base
    whole = weight if form == "explicit" else ops.quantize(weight, form)
    assert all(map(torch.equal, residual_tensors(kept.residual).values(), residual_tensors(whole).values()))
    assert not kept.start.b0.any()


@pytest.mark.parametrize(("form", "repair", "iters", "start"), LIVES)
def test_an_adapter_s_life(form: str, repair: str, iters: int, start: str, tmp_path: Path) -> None:
    model, x = wrapped(form, repair, iters, start), inputs()
    layer = adapted(model)
    model.add_adapter("same", model.peft_config["default"])
    assert layer.start_of("same") is layer.start_of("default")
    model.add_adapter("second", pissa.PissaConfig(r=2, target_modules=["proj"]))
    change_a_little(layer)
    change_a_little(layer, "second", seed=4)
    weight, change = base64(layer), change64(layer, *deltas64(layer)).detach()
    dense = fetch(x).double() @ (weight + change).T + fetch(layer.bias.detach()).double()
    with torch.no_grad():
        assert error(layer.get_delta_weight("default"), change) < 1e-5
        assert error(model(x), dense) < 1e-5
        model.merge_adapter(["default"])
        assert error(model(x), dense) < 1e-5
        model.unmerge_adapter()
        expected = {}
        for name in ("default", "second"):
            model.set_adapter(name)
            expected[name] = model(x)

        model.save_pretrained(tmp_path)
        again = pissa.PissaModel.from_pretrained(base(), tmp_path)
        again.load_adapter(tmp_path / "second", "second")
        alone = pissa.PissaModel.from_pretrained(base(), tmp_path / "second", "second")
        for found, name in ((again, "default"), (again, "second"), (alone, "second")):
            found.set_adapter(name)
            assert torch.equal(found(x), expected[name])
            assert all(map(torch.equal, kept(found), kept(model)))
            assert adapted(found).base.start.origin == layer.base.start.origin
        plain = peft.PeftModel.from_pretrained(base(), tmp_path)
        assert error(plain.base_model.model.proj.get_delta_weight("default"), change) < 1e-4

        matrix = layer.base.matrix()
        assert torch.equal(model.unload().proj.weight, matrix)


def test_files_without_what_the_residual_lacks_are_refused(tmp_path: Path) -> None:
    """Or with a part of it in another shape; the record says its rank."""
    wrapped("nf4", "pissa", 2, "pissa").save_pretrained(tmp_path)
    path = tmp_path / "pissa.safetensors"
    tensors = read_tensors(path)
    assert tensors.keys() == {f"proj.{name}" for name in ("delta_a", "delta_b", "a0", "b0", "recipe.a", "recipe.b")}
    for value in (None, torch.zeros(R + 1, IN)):
        damaged = {name: value if name.endswith("recipe.a") else tensor for name, tensor in tensors.items()}
        write_marked(tmp_path, {name: tensor for name, tensor in damaged.items() if tensor is not None})
        with pytest.raises(ValueError, match=r"pissa\.safetensors: tensor 'proj\.recipe\.a' is .*, of|for layer proj"):
            pissa.PissaModel.from_pretrained(base(), tmp_path)

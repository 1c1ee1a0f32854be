"""DoRA and the other places to start from, each against its formula in float64, and on stored bases; their
life on others is in test_kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import devices
import pissa
from language_models import FORMS, Make, error, logits, train
from pissa import PissaModel, ops
from pissa.layers.layer import Magnitude, pissa_layers
from pissa.model.calibration import Calibration
from reference import EPS, power_law

VARIANTS = {"dora": {"use_dora": True}}
BASES = {
    **FORMS,
    "repaired": {"quant": "nf4", "init": "lora", "repair": "pissa"},
    "alternated": {"quant": "nf4", "quant_iters": 2},
}
pytestmark = pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")


def one_layer(fields: dict[str, object], bias: bool = True, **sizes: int) -> tuple[nn.Module, nn.Linear]:
    """A wrapped model of one linear layer whose adapter has been moved away from its start, and a copy of the layer."""
    out_features, in_features = sizes.get("out", 20), sizes.get("into", 24)
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(power_law(out_features, in_features, 0.5))
        if bias:
            linear.bias.copy_(torch.randn(out_features, generator=generator))
    twin = nn.Linear(in_features, out_features, bias=bias)
    twin.load_state_dict(linear.state_dict())
    model = pissa.wrap(devices.put(nn.Sequential(linear)), r=4, target_modules=["0"], **fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += devices.put(0.3 * torch.randn(parameter.shape, generator=generator)) * 0.5
    return model, twin


def layer_of(model: nn.Module) -> object:
    return pissa_layers(model.base_model.model, "default")["0"]


def base_weight(model: nn.Module) -> Tensor:
    """float64, of the base function."""
    return devices.fetch(layer_of(model).base.matrix()).double()


def factors(model: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """The layer's tensors in float64."""
    layer = layer_of(model)
    start = layer.start_of("default")
    tensors = {"a0": start.a0, "b0": start.b0}
    tensors |= layer.deltas("default")._asdict()
    if "default" in layer.lora_magnitude_vector:
        tensors["m"] = layer.magnitude("default").weight
    doubles = {name: devices.fetch(tensor.detach()).double() for name, tensor in tensors.items()}
    return {name: tensor.requires_grad_(gradients and name not in ("a0", "b0")) for name, tensor in doubles.items()}


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], scaling: float = 1.0) -> Tensor:
    """The weight of a layer with an adapter, by the definitions."""
    a0, b0, a, b = (tensors[name] for name in ("a0", "b0", "a", "b"))
    weight = weight + scaling * ((b0 + b) @ (a0 + a) - b0 @ a0)
    if "m" in tensors:
        weight = tensors["m"][:, None] * weight / weight.norm(dim=1, keepdim=True).detach()
    return weight


@pytest.mark.parametrize("form", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_are_those_of_the_definition(variant: str, form: str) -> None:
    model, twin = one_layer(VARIANTS[variant] | BASES[form], out=32, into=64)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(4))
    tensors = factors(model, gradients=True)
    weight = adapted_weight(base_weight(model), tensors)
    expected = x.double() @ weight.mT + twin.bias.double()
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    expected.backward(upstream.double())

    got = model(devices.put(x))
    got.backward(devices.put(upstream))
    # Sums of at most 64 + 8 + 20 terms, whose absolute values add up to less than 20 times the result's norm.
    bound = 20 * 92 * EPS[torch.float32]
    assert error(devices.fetch(got), expected) < bound
    layer = layer_of(model)
    parameters = layer.deltas("default")._asdict()
    if "use_dora" in VARIANTS[variant]:
        parameters["m"] = layer.magnitude("default").weight
    for name, parameter in parameters.items():
        owner = next(p for p in model.parameters() if p.data_ptr() == parameter.data_ptr())
        assert error(devices.fetch(owner.grad), tensors[name].grad) < bound, name


def test_two_adapters_with_magnitudes_add_their_own_changes(tmp_path: Path) -> None:
    model, twin = one_layer({"use_dora": True})
    model.add_adapter("other", pissa.PissaConfig(r=2, target_modules=["0"], use_dora=True))
    layer = layer_of(model)
    layer.magnitude("other").weight.data *= 1.5
    x = devices.put(torch.randn(5, 24, generator=torch.Generator().manual_seed(6)))
    base = twin.to(x.device)(x)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(x).detach()
    model.base_model.set_adapter(["default", "other"])
    assert error(model(x).detach(), alone["default"] + alone["other"] - base.detach()) < 8 * EPS[torch.float32]


@settings(deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), r=st.integers(1, 4), size=st.sampled_from([0.0, 1e-3, 1.0, 30.0])
)
def test_lengths_of_rows_without_the_dense_change(rows: int, columns: int, r: int, size: float) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns * 10 + r)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0] = 0  # a row without a direction
    left, right = size * torch.randn(rows, r, generator=generator), torch.randn(r, columns, generator=generator)
    magnitude = Magnitude(weight.norm(dim=1))
    scale = magnitude.scale(left, right, right @ weight.mT, 0.5)
    scale.sum().backward()
    assert magnitude.weight.grad.isfinite().all()
    got = scale.detach()
    lengths = (weight.double() + 0.5 * left.double() @ right.double()).norm(dim=1)
    if size == 0:
        assert torch.equal(got, torch.ones(rows))
    # The square is a sum of terms up to (‖w‖ + ‖l R‖)²: where they cancel, the error is relative to those.
    terms = (weight.double().norm(dim=1) + 0.5 * (left.double().abs() @ right.double().norm(dim=1))).square()
    for i in range(1, rows):
        square = (magnitude.weight[i].double() / got[i].double()).square()
        assert abs(square - lengths[i].square()) <= 8 * (columns + 2 * r) * EPS[torch.float32] * terms[i]


# ---- Other starts ----------------------------------------------------------------------------------------------------


def start_of(weight: Tensor, **fields: object) -> tuple[Tensor, Tensor, nn.Module]:
    """a0, b0 in float64 of an adapter on one layer, and the model."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    model = pissa.wrap(devices.put(nn.Sequential(linear)), r=4, target_modules=["0"], **fields)
    tensors = factors(model)
    return tensors["a0"], tensors["b0"], model


def test_pissa_starts_from_the_principal_components() -> None:
    weight = power_law(20, 24, 1.0).float()
    a0, b0, _ = start_of(weight, lora_alpha=8)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    # Singular vectors turn by rounding errors of the weight over the gap, 1/4 - 1/5.
    assert error(2 * b0 @ a0, (u[:, :4] * s[:4]) @ vh[:4]) < 20 * 24 * EPS[torch.float32]
    assert torch.allclose(a0.norm(dim=1), b0.norm(dim=0), rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_component_that_the_weight_lacks_starts_as_lora_s(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, rank, generator=generator) @ torch.randn(rank, 30, generator=generator)
    a0, b0, _ = start_of(weight, seed=1)
    drawn, _, _ = start_of(weight, init="lora", seed=1)
    assert torch.equal(a0[rank:], drawn[rank:])
    assert not b0[:, rank:].any()
    if rank:
        assert error(b0 @ a0, weight) < 64 * EPS[torch.float32]


@pytest.mark.parametrize("fields", [{}, {"quant": "nf4"}, {"init": "activations", "quant": "nf4"}])
def test_a_weight_of_zeros_learns_and_is_restored(
    fields: dict[str, object], tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    def base() -> nn.Module:
        model = tiny_llama(num_hidden_layers=1)
        nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
        return model

    calibration = [{"input_ids": tokens}] if fields.get("init") == "activations" else None
    model = pissa.wrap(base(), r=4, calibration=calibration, **fields)
    train(model.train(), tokens)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    assert all(delta.any() for delta in layer.deltas("default"))
    model.save_pretrained(tmp_path)
    again = PissaModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert train(again.train(), tokens) == train(model, tokens)


def test_lora_starts_from_zero_and_from_the_seed() -> None:
    weight = power_law(20, 24, 1.0).float()
    a0, b0, _ = start_of(weight, init="lora", seed=1)
    assert not b0.any()
    assert a0.abs().max() <= 24**-0.5
    assert a0.std() == pytest.approx((24 * 3) ** -0.5, rel=0.2)  # of a uniform distribution, 96 draws
    assert torch.equal(start_of(weight, init="lora", seed=1)[0], a0)
    assert not torch.equal(start_of(weight, init="lora", seed=2)[0], a0)


def test_activations_start_from_what_four_bits_lose() -> None:
    """Of the weight itself, if the inputs are alike in every direction."""
    weight, alike = power_law(64, 96, 0.3).float(), Calibration({"0": devices.put(torch.eye(96))}, 1)
    a0, b0, model = start_of(weight, init="activations", quant="nf4", double_quant=False, calibration=alike)
    lost = weight.double() - ops.dequantize(ops.quantize(weight, double_quant=False)).double()
    u, s, vh = torch.linalg.svd(lost, full_matrices=False)
    assert error(b0 @ a0, (u[:, :4] * s[:4]) @ vh[:4]) < 5e-3  # singular values lie close together
    now = weight.double() - base_weight(model)
    assert now.norm() < lost.norm()
    assert error(now.norm(), s[4:].norm()) < 1e-4


ON_FOUR_BITS: dict[str, dict[str, object]] = {**VARIANTS, "lora": {"init": "lora"}}


@pytest.mark.parametrize("variant", ON_FOUR_BITS)
def test_every_variant_on_four_bits_starts_as_the_base_learns_and_is_restored(
    variant: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    model = pissa.wrap(
        tiny_llama(num_hidden_layers=1), r=4, task_type="CAUSAL_LM", quant="nf4", **ON_FOUR_BITS[variant]
    )
    with model.disable_adapter():
        base = logits(model, tokens)
    assert error(logits(model, tokens), base) < 1e-5  # one product with the residual, and two
    losses = train(model.train(), tokens)
    assert losses[-1] < losses[0]
    trained = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path)
    again = PissaModel.from_pretrained(tiny_llama(num_hidden_layers=1), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again, tokens), trained)
    assert train(again, tokens) == train(model, tokens)
    with again.disable_adapter():
        assert torch.equal(logits(again, tokens), base)

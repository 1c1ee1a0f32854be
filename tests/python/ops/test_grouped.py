"""ops.grouped_linear is ops.linear of each layer: outputs, gradients, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from daily import each
from devices import put
from pissa import ops
from reference import unit_errors

OUT, IN, R = 40, 64, 3
ROWS = (0, 3, 1, 0, 20, 17, 0)  # of each layer
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"double_quant": False},
    "nf4-nested": {},
    "nf4-small": {"blocksize": 32},
    "int8": {"format": "int8"},
    "nvfp4": {"format": "nvfp4"},
    "fp8": {"format": "fp8"},
}


def group(format: str = "nf4-nested", dtype: torch.dtype = torch.float32, start: bool = True) -> dict[str, Any]:
    """The arguments of a call."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return put(torch.randn(*shape, generator=generator))

    given: dict[str, Any] = {
        "x": drawn(sum(ROWS), IN).to(dtype).requires_grad_(),
        "weights": [ops.quantize(drawn(OUT, IN), **FORMATS[format]) for _ in ROWS],
        "offsets": [sum(ROWS[:i]) for i in range(len(ROWS) + 1)],
        "scaling": 0.5,
    }
    for name, shape in {"a": (R, IN), "b": (OUT, R), "a0": (R, IN), "b0": (OUT, R)}.items():
        if start or "0" not in name:
            given[name] = [drawn(*shape).requires_grad_("0" not in name) for _ in ROWS]
    return given


def one_by_one(given: dict[str, Any]) -> Tensor:
    names = [name for name in ("a", "b", "a0", "b0") if name in given]
    ends = zip(given["offsets"], given["offsets"][1:], strict=False)
    return torch.cat(
        [
            ops.linear(given["x"][first:last], weight, **{n: given[n][i] for n in names}, scaling=given["scaling"])
            for i, (weight, (first, last)) in enumerate(zip(given["weights"], ends, strict=True))
        ]
    )


def gradients(y: Tensor, given: dict[str, Any]) -> list[Tensor]:
    dy = put(torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).to(y.dtype)
    return list(torch.autograd.grad(y, [given["x"], *given["a"], *given["b"]], dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", each(FORMATS, ["nf4-nested", "int8"]))
@pytest.mark.parametrize("start", [True, False])
def test_it_is_each_layer_by_itself(format: str, dtype: torch.dtype, start: bool) -> None:
    given = group(format, dtype, start)
    y, expected = ops.grouped_linear(**given), one_by_one(given)
    pairs = zip([y, *gradients(y, given)], [expected, *gradients(expected, given)], strict=True)
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype
        if devices.current.type == "cpu":
            assert torch.equal(got, wanted)
        else:  # where more than 16 rows take another kernel
            limit = unit_errors(IN + R + 16, dtype) * wanted.detach().abs().amax().double().item() * IN**0.5
            assert (got - wanted).abs().max() <= limit


def test_layers_without_rows_have_gradients_of_zero() -> None:
    given = group()
    y = ops.grouped_linear(**given)
    y.sum().backward()
    for rows, a, b in zip(ROWS, given["a"], given["b"], strict=True):
        assert (a.grad.any(), b.grad.any()) == (rows > 0, rows > 0)


def test_no_rows_at_all() -> None:
    given = group() | {"offsets": [0] * (len(ROWS) + 1)}
    given["x"] = given["x"].detach()[:0].requires_grad_()
    y = ops.grouped_linear(**given)
    assert y.shape == (0, OUT)
    assert not any(gradient.any() for gradient in gradients(y, given))


def test_only_wanted_gradients_are_returned() -> None:
    given = group()
    given["x"], given["b"] = given["x"].detach(), [b.detach() for b in given["b"]]
    given["a"][1] = given["a"][1].detach()
    ops.grouped_linear(**given).sum().backward()
    assert [a.grad is not None for a in given["a"]] == [i != 1 for i in range(len(ROWS))]
    assert all(tensor.grad is None for tensor in (given["x"], *given["b"]))


def test_autocast_computes_in_its_dtype() -> None:
    given = group()
    with torch.autocast(devices.current.type, torch.bfloat16):
        y = ops.grouped_linear(**given)
    assert torch.equal(y, ops.grouped_linear(**(given | {"x": given["x"].bfloat16()})))


def changed(name: str, layer: int, change: Any) -> Any:
    """A change of one layer's item in a list."""

    def of(given: dict[str, Any]) -> dict[str, Any]:
        items = list(given[name])
        items[layer] = change(items[layer])
        return {name: items}

    return of


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda given: {"weights": []}, ValueError, "weights: got none; needed: that of one layer at least"),
        (lambda given: {"a": given["a"][1:]}, ValueError, "a: got 6; needed: one for each of the 7 weights"),
        (lambda given: {"b0": None}, ValueError, "factors: give a with b, and a0 with b0"),
        (lambda given: {"scaling": float("nan")}, ValueError, "scaling: got nan; allowed: a finite number"),
        (lambda given: {"x": given["x"][None]}, ValueError, r"x: got shape \[1, 41, 64\]; needed: \[rows, in\]"),
        (lambda given: {"x": given["x"][:, 1:]}, ValueError, r"x: got shape \[41, 63\]; needed: \[..., in\] with in"),
        (lambda given: {"offsets": given["offsets"][1:]}, ValueError, "needed: 8 numbers, ascending from 0 to 41"),
        (lambda given: {"offsets": [0, 5, 4, 4, 4, 4, 4, 41]}, ValueError, r"offsets: got \[0, 5, 4.*ascending"),
        (lambda given: {"offsets": [1, *given["offsets"][1:]]}, ValueError, r"offsets: got \[1, 0"),
        (lambda given: {"offsets": [0, *given["offsets"][1:-1], 40]}, ValueError, "ascending from 0 to 41"),
        (changed("offsets", 2, float), TypeError, r"offsets: got \[0, 0, 3.0, .*\]; needed: ints"),
        (changed("weights", 2, lambda w: w.codes), TypeError, "layer 2: weight: got Tensor; needed: QuantizedWeight"),
        (
            changed("weights", 2, lambda w: ops.quantize(ops.dequantize(w), double_quant=False)),
            ValueError,
            r"layer 2: weight: got nf4 \[40, 64\], blocksize 64, 40 scales in torch.float32; needed: what layer 0 has",
        ),
        (changed("a", 3, lambda a: a[:, 1:]), ValueError, r"layer 3: a: got shape \[3, 63\]; needed: \[r, in\]"),
        (changed("b0", 3, lambda b: b[:, 1:]), ValueError, r"layer 3: b0: got shape \[40, 2\]; needed: that of b"),
        (changed("a0", 3, lambda a: a.requires_grad_()), ValueError, "layer 3: a0: requires grad, but is frozen here"),
        (
            lambda given: {n: [f[:2] if n == "a" else f[:, :2], *given[n][1:]] for n in "ab" for f in given[n][:1]},
            ValueError,
            r"a: got ranks \[2, 3\]; needed: one for all layers",
        ),
        pytest.param(
            *(changed("b", 3, lambda b: b.to("meta")), ValueError, "layer 3: b on meta; x, weight, a, a0, b0 on"),
            marks=pytest.mark.cpu_only,
        ),
    ],
)
def test_refusals(change: Any, kind: type[Exception], words: str) -> None:
    given = group(start="ranks" not in words)
    with pytest.raises(kind, match=words):
        ops.grouped_linear(**(given | change(given)))

"""ops.linear: values, gradients, dtypes, layouts, torch.compile, autocast, checkpointing, opcheck."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import devices
import reference
from daily import each
from devices import fetch, put
from pissa import ops
from pissa.ops._load import FORCED
from reference import EPS, assert_close, unit_errors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["none", "lora", "stored", "implicit"]
QUANTIZED: dict[str, dict[str, object]] = {"nf4": {"double_quant": False}, "nf4-nested": {}, "int8": {"format": "int8"}}
WEIGHTS = ["dense", *QUANTIZED]
RELEASED = ["mxfp4", "nvfp4", "int4", "fp8"]


class Case:
    """One linear layer with all its tensors, and the same in float64."""

    def __init__(
        self,
        form: str,
        weight: str,
        dtype: torch.dtype,
        tokens: int,
        n_in: int,
        n_out: int,
        r: int,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return put(torch.randn(*shape, generator=generator))

        self.form = form
        self.x = randn(tokens, n_in).to(dtype).requires_grad_()
        dense = (randn(n_out, n_in) / n_in**0.5).to(dtype)
        self.weight = dense if weight == "dense" else ops.quantize(dense, **QUANTIZED.get(weight, {"format": weight}))
        self.dense = dense if weight == "dense" else ops.dequantize(self.weight)
        self.bias = randn(n_out).requires_grad_()
        self.dy = randn(tokens, n_out).to(dtype)
        self.options: dict[str, object] = {}
        if form != "none":
            self.options |= {
                "a": randn(r, n_in).requires_grad_(),
                "b": randn(n_out, r).requires_grad_(),
            }
            self.options |= {"scaling": 0.5}
        if form in ("stored", "implicit"):
            self.options |= {"a0": randn(r, n_in), "b0": randn(n_out, r), "implicit": form == "implicit"}

    def run(self) -> Tensor:
        return ops.linear(self.x, self.weight, self.bias, **self.options)

    def trainable(self) -> dict[str, Tensor]:
        tensors = {"x": self.x, "bias": self.bias}
        return tensors | {name: self.options[name] for name in ("a", "b") if name in self.options}

    def double(self) -> tuple[list[Tensor], dict[str, object]]:
        def up(t: object) -> object:
            return fetch(t.detach()).double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

        return [up(t) for t in (self.x, self.dense, self.bias)], {k: up(v) for k, v in self.options.items()}

    def check(self) -> None:
        y = self.run()
        grads = torch.autograd.grad(y, list(self.trainable().values()), self.dy)
        args, options = self.double()
        expected = reference.linear(*args, **options)
        names = list(self.trainable())
        leaves = [args[0], args[2], *(options[name] for name in names[2:])]
        dy = fetch(self.dy).double()
        expected_grads = torch.autograd.grad(expected, leaves, dy)
        # Every value is a sum of products of at most four factors. A sum of k terms in float32, in any order, has an
        # error of at most k u sum|terms|; k is the longest inner dimension, plus the few products and additions around.
        absolute = [t.detach().abs().requires_grad_() for t in args]
        absolute_options = {
            k: v.detach().abs().requires_grad_() if isinstance(v, Tensor) else v for k, v in options.items()
        }
        bound = reference.linear(*absolute, **absolute_options)
        absolute_leaves = [absolute[0], absolute[2], *(absolute_options[name] for name in names[2:])]
        bound_grads = torch.autograd.grad(bound, absolute_leaves, dy.abs())
        k = max(*self.dense.shape, self.x.shape[0]) + 16
        assert y.dtype == self.x.dtype
        errors = unit_errors(k, self.x.dtype)
        assert_close(y.detach(), expected.detach(), errors * bound.detach(), "y")
        for name, got, want, limit in zip(names, grads, expected_grads, bound_grads, strict=True):
            # The bias gradient is torch's own sum in dy's dtype.
            of_name = k * EPS[self.x.dtype] if name == "bias" else errors
            assert_close(got, want, of_name * limit, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [*WEIGHTS, *RELEASED])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form: str, weight: str, dtype: torch.dtype) -> None:
    Case(form, weight, dtype, tokens=37, n_in=64, n_out=130, r=5).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["nf4-nested", "int8", *RELEASED])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17])
def test_few_tokens_of_a_quantised_weight(tokens: int, weight: str, dtype: torch.dtype) -> None:
    for n_in in (128,) if weight in RELEASED else (96, 259):
        Case("stored", weight, dtype, tokens, n_in, n_out=70, r=5).check()


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    weight=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 70),
    n_in=st.integers(1, 300),
    n_out=st.integers(1, 300),
    data=st.data(),
)
def test_any_shape(
    form: str, weight: str, dtype: torch.dtype, tokens: int, n_in: int, n_out: int, data: st.DataObject
) -> None:
    r = data.draw(st.integers(1, min(n_in, n_out)))
    Case(form, weight, dtype, tokens, n_in, n_out, r, seed=tokens).check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", ["dense", "nf4-nested"])
def test_no_tokens(form: str, weight: str) -> None:
    case = Case(form, weight, torch.float32, tokens=0, n_in=64, n_out=32, r=4)
    y = case.run()
    assert y.shape == (0, 32)
    grads = torch.autograd.grad(y.sum(), list(case.trainable().values()))
    assert all((g == 0).all() for g in grads)
    assert [g.shape for g in grads] == [t.shape for t in case.trainable().values()]


@pytest.mark.skipif(FORCED, reason="about the kernels")
@pytest.mark.parametrize("weight", ["dense", "nf4", "int8"])
def test_layouts_and_leading_dimensions_do_not_matter(weight: str) -> None:
    case = Case("implicit", weight, torch.float32, tokens=24, n_in=64, n_out=48, r=4)
    expected = case.run()
    args = {k: v.detach() if isinstance(v, Tensor) else v for k, v in case.options.items()}
    strided = {k: v.mT.contiguous().mT if isinstance(v, Tensor) else v for k, v in args.items()}
    x = torch.stack([case.x.detach(), torch.full_like(case.x, torch.nan)], dim=-1)[..., 0].view(2, 3, 4, 64)
    assert not x.is_contiguous()
    weight_arg = case.weight.mT.contiguous().mT if isinstance(case.weight, Tensor) else case.weight
    y = ops.linear(x, weight_arg, case.bias.detach(), **strided)
    assert y.shape == (2, 3, 4, 48)
    assert torch.equal(y.view(24, 48), expected)
    # One row alone meets the codes in another order, so its last digits may differ.
    vector = ops.linear(case.x.detach()[3], case.weight, case.bias.detach(), **args)
    torch.testing.assert_close(vector, expected[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("one_node", [True, False])
def test_a_vector_has_the_gradients_of_one_row(one_node: bool) -> None:
    cases = [Case("implicit", "dense", torch.float32, tokens=1, n_in=32, n_out=16, r=2) for _ in range(2)]
    for case, shape in zip(cases, ((1, 32), (32,)), strict=True):
        x = case.x.detach().view(shape).requires_grad_() if one_node else case.x.view(shape)
        ops.linear(x, case.weight, case.bias, **case.options).square().sum().backward()
    row, vector = cases
    for name in ("bias", "a", "b"):
        assert torch.equal(vector.trainable()[name].grad, row.trainable()[name].grad)


@pytest.mark.parametrize("one_node", [True, False])
@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_second_derivatives_are_refused(weight: str, one_node: bool) -> None:
    case = Case("implicit", weight, torch.float32, tokens=8, n_in=64, n_out=32, r=2)
    x = case.x if one_node else case.x.clone()
    y = ops.linear(x, case.weight, case.bias, **case.options)
    with pytest.raises(RuntimeError, match="differentiated only once: got a backward pass with create_graph=True"):
        torch.autograd.grad(y.sum(), case.x, create_graph=True)
    torch.autograd.grad(y.sum(), case.x)  # nothing was freed


def test_only_wanted_gradients_are_returned() -> None:
    case = Case("lora", "dense", torch.float32, tokens=8, n_in=32, n_out=16, r=2)
    x = case.x.detach()
    y = ops.linear(x, case.weight, a=case.options["a"], b=case.options["b"].detach())
    y.sum().backward()
    assert case.options["a"].grad is not None
    assert case.options["b"].grad is None
    assert x.grad is None


@pytest.mark.parametrize("weight", each(["dense", "nf4-nested", "int8"], ["nf4-nested"]))
def test_compiles_without_a_graph_break(weight: str) -> None:
    case = Case("implicit", weight, torch.float32, tokens=8, n_in=64, n_out=32, r=3)
    factors = {k: v for k, v in case.options.items() if isinstance(v, Tensor)}

    def layer(x: Tensor, bias: Tensor, factors: dict[str, Tensor]) -> Tensor:
        return ops.linear(x, case.weight, bias, **factors, scaling=0.5, implicit=True).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (8, 5):
        x = case.x.detach()[:tokens].requires_grad_()
        leaves = [x, *case.trainable().values()][:1] + list(case.trainable().values())[1:]
        expected, got = layer(x, case.bias, factors), compiled(x, case.bias, factors)
        assert torch.equal(got, expected)
        for g, e in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            assert torch.equal(g, e)


def test_autocast_computes_in_its_dtype() -> None:
    case = Case("implicit", "dense", torch.float32, tokens=8, n_in=64, n_out=32, r=3)
    with torch.autocast(devices.current.type, torch.bfloat16):
        y = case.run()
    assert y.dtype == torch.bfloat16
    low = ops.linear(case.x.bfloat16(), case.weight, case.bias, **case.options)
    assert torch.equal(y, low)
    y.float().sum().backward()
    assert case.x.grad is not None
    assert case.x.grad.dtype == torch.float32
    assert case.options["a"].grad.dtype == torch.float32


def test_low_precision_factors_are_computed_with_in_float32() -> None:
    case = Case("stored", "dense", torch.bfloat16, tokens=8, n_in=64, n_out=32, r=3)
    low = {k: v.detach().bfloat16() if isinstance(v, Tensor) else v for k, v in case.options.items()}
    low |= {k: low[k].requires_grad_() for k in ("a", "b")}
    high = {k: v.detach().float() if isinstance(v, Tensor) else v for k, v in low.items()}
    y = ops.linear(case.x, case.weight, **low)
    assert torch.equal(y, ops.linear(case.x, case.weight, **high))
    y.sum().backward()
    assert low["a"].grad.dtype == torch.bfloat16


def _arguments() -> dict[str, object]:
    case = Case("implicit", "dense", torch.float32, tokens=4, n_in=64, n_out=32, r=3)
    return {"x": case.x.detach(), "weight": case.weight, "bias": case.bias.detach(), **case.options}


BAD = [
    ("x", [1.0], TypeError),
    ("x", torch.ones(4, 64, dtype=torch.int64), TypeError),
    ("x", torch.ones(4, 64, dtype=torch.float64), TypeError),
    ("x", torch.ones(4, 63), ValueError),
    ("x", torch.ones(()), ValueError),
    ("weight", torch.ones(32, 64, dtype=torch.uint8), TypeError),
    ("weight", torch.ones(64), ValueError),
    ("weight", torch.ones(32, 64, requires_grad=True), ValueError),
    ("weight", torch.ones(32, 64, device="meta"), ValueError),
    ("bias", torch.ones(31), ValueError),
    ("bias", torch.ones(32, 1), ValueError),
    ("a", torch.ones(0, 64), ValueError),
    ("a", torch.ones(3, 63), ValueError),
    ("b", torch.ones(32, 4), ValueError),
    ("b", torch.ones(32, 3, dtype=torch.complex64), TypeError),
    ("a0", torch.ones(4, 64), ValueError),
    ("a0", torch.ones(3, 64, requires_grad=True), ValueError),
    ("b0", torch.ones(31, 3), ValueError),
    ("b0", torch.ones(32, 3, requires_grad=True), ValueError),
    ("scaling", float("inf"), ValueError),
    ("scaling", float("nan"), ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_bad_arguments_are_refused_by_name(name: str, value: object, error: type[Exception]) -> None:
    arguments = _arguments() | {name: put(value)}
    x, weight, bias = (arguments.pop(key) for key in ("x", "weight", "bias"))
    with pytest.raises(error, match=rf"^{name}\b"):
        ops.linear(x, weight, bias, **arguments)


def test_a_sparse_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^x: got layout torch.sparse_coo; needed: a dense"):
        ops.linear(put(torch.ones(4, 64).to_sparse()), put(torch.ones(32, 64)))


@pytest.mark.parametrize("missing", ["a", "b", "a0", "b0"])
def test_half_a_pair_of_factors_is_refused(missing: str) -> None:
    arguments = _arguments() | {missing: None}
    x, weight, bias = (arguments.pop(key) for key in ("x", "weight", "bias"))
    with pytest.raises(ValueError, match="factors: give"):
        ops.linear(x, weight, bias, **arguments)


@pytest.mark.skipif(FORCED, reason="about the kernels")
def test_compiled_ops_refuse_what_would_read_out_of_bounds() -> None:
    def ones(*shape: int) -> Tensor:
        return put(torch.ones(*shape))

    x, w, a, b = ones(4, 64), ones(32, 64), ones(3, 64), ones(32, 3)
    call = torch.ops.pissa.linear
    for bad in (
        lambda: call(ones(4, 60), w, None, None, None, None, None, 1.0, False),
        lambda: call(x, w, ones(31), None, None, None, None, 1.0, False),
        lambda: call(x, w, None, a, b[:31], None, None, 1.0, False),
        lambda: call(x, w, None, a.double(), b, None, None, 1.0, False),
        lambda: call(x, w, None, a, None, None, None, 1.0, False),
        lambda: torch.ops.pissa.quantized_linear(
            x,
            put(torch.zeros(3, dtype=torch.uint8)),
            ones(1),
            None,
            None,
            "nf4",
            64,
            32,
            None,
            None,
            None,
            None,
            None,
            1.0,
            False,
        ),
        lambda: torch.ops.pissa.linear_backward(ones(3, 32), x, w, None, None, None, None, ones(0), 1.0, False, True),
    ):
        with pytest.raises(
            (RuntimeError, ValueError), match=r"needed|must be|in pairs|allowed"
        ):  # the type depends on torch
            bad()


# ---- The change alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["lora", "implicit"])
def test_add_low_rank_values_and_gradients(form: str, dtype: torch.dtype) -> None:
    case = Case(form, "dense", dtype, tokens=37, n_in=96, n_out=130, r=5)
    base = put(torch.randn(37, 130).to(dtype).requires_grad_())
    options = {k: v for k, v in case.options.items() if k != "implicit"}
    leaves = [base, case.x, options["a"], options["b"]]
    y = ops.add_low_rank(base, case.x, **options)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, leaves, case.dy)

    def formula(sign: object) -> tuple[Tensor, list[Tensor]]:
        x = sign(fetch(case.x.detach()).double()).requires_grad_()
        dy = sign(fetch(case.dy).double())
        named = {
            k: sign(fetch(v.detach()).double()).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
            for k, v in case.options.items()
        }
        zero = torch.zeros(130, 96, dtype=torch.float64)
        wanted = reference.linear(x, zero, **named)
        inner = torch.autograd.grad(wanted, [x, named["a"], named["b"]], dy)
        return wanted.detach() + sign(fetch(base.detach()).double()), [dy, *inner]

    expected, expected_grads = formula(lambda t: t)
    bound, bound_grads = formula(torch.abs)
    k = 130 + 16  # the longest sum; see Case.check
    errors = unit_errors(k, dtype)
    assert_close(y.detach(), expected, errors * bound, "y")
    for name, got, want, limit in zip(("y", "x", "a", "b"), grads, expected_grads, bound_grads, strict=True):
        assert_close(got, want, errors * limit, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_low_rank_keeps_the_dtype_of_y(dtype: torch.dtype) -> None:
    case = Case("implicit", "dense", dtype, tokens=9, n_in=64, n_out=33, r=4)
    factors = {name: case.options[name] for name in ("a", "b", "a0", "b0", "scaling")}
    exact = ops.add_low_rank(put(torch.zeros(9, 33)), case.x.float(), **factors)
    for other in DTYPES:
        y = ops.add_low_rank(put(torch.zeros(9, 33, dtype=other)), case.x, **factors)
        assert y.dtype == other
        # x's dtype may round the factors, y's rounds the sum.
        torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_add_low_rank_compiles() -> None:
    case = Case("implicit", "dense", torch.float32, tokens=6, n_in=64, n_out=32, r=3)
    base = put(torch.randn(6, 32, requires_grad=True))
    options = {k: v for k, v in case.options.items() if k != "implicit"}
    compiled = torch.compile(lambda b, x: ops.add_low_rank(b, x, **options), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(base, case.x), ops.add_low_rank(base, case.x, **options))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("y", torch.ones(4, 31), ValueError),
        ("y", torch.ones(5, 32), ValueError),
        ("y", [1.0], TypeError),
        ("x", torch.ones(4, 64, dtype=torch.int8), TypeError),
        ("a", torch.ones(3, 63), ValueError),
        ("b", torch.ones(32, 2), ValueError),
        ("a0", torch.ones(2, 64), ValueError),
        ("b0", None, ValueError),
        ("scaling", float("nan"), ValueError),
    ],
)
def test_add_low_rank_refuses_by_name(name: str, value: object, error: type[Exception]) -> None:
    arguments = _arguments() | {"y": put(torch.ones(4, 32))}
    for other in ("weight", "bias", "implicit"):
        arguments.pop(other)
    names = {"y": "y|b", "b0": "factors"}.get(name, name)
    with pytest.raises(error, match=rf"^({names})\b"):
        ops.add_low_rank(**(arguments | {name: put(value)}))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["dense", "nf4-nested", "int8"])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_a_change_of_zero_leaves_the_bits(tokens: int, weight: str, dtype: torch.dtype) -> None:
    """Whether the thin terms fit into the last panel of the weight or have one of their own: 32 to 400 columns after
    576, 640 and 1,280."""
    for n_in, r in [(576, 16), (576, 200), (640, 32), (1280, 8)]:
        case = Case("implicit", weight, dtype, tokens, n_in, 64, r)
        case.options |= {name: torch.zeros_like(case.options[name]) for name in ("a", "b")}
        assert torch.equal(case.run(), ops.linear(case.x, case.weight, case.bias))


@pytest.mark.cpu_only
@pytest.mark.parametrize("rows", [1, 4, 5, 20])
def test_a_quantised_weight_without_inputs_gives_the_bias(rows: int) -> None:
    ops.linear(torch.randn(rows, 64), ops.quantize(torch.randn(5, 64), "nf4"))  # what it must not find again
    codes, absmax = torch.empty(0, dtype=torch.uint8), torch.empty(0)
    weight = ops.QuantizedWeight(codes, absmax, None, None, "nf4", (5, 0), 64)
    assert torch.equal(ops.linear(torch.zeros(rows, 0), weight, torch.arange(5.0)), torch.arange(5.0).expand(rows, 5))

"""The linear op as two nodes: the same bits, and a checkpoint leaves out a product that nobody needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pissa import ops

pytestmark = pytest.mark.cpu_only
OUT, IN, R, ROWS = 48, 64, 4, 20
WEIGHTS = {
    "dense": lambda weight: weight.bfloat16(),
    "nf4": ops.quantize,
    "nf4, flat scales": lambda weight: ops.quantize(weight, double_quant=False),
    "int8": lambda weight: ops.quantize(weight, "int8"),
}
weights = pytest.mark.parametrize("weight", WEIGHTS)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(weight: str, is_lora: bool, dtype: torch.dtype) -> dict[str, Any]:
    start = {} if is_lora else {"a0": drawn(R, IN, seed=3), "b0": drawn(OUT, R, seed=4)}
    return start | {
        "x": drawn(2, ROWS // 2, IN, seed=0).to(dtype).requires_grad_(),
        "weight": WEIGHTS[weight](drawn(OUT, IN, seed=1)),
        "bias": drawn(OUT, seed=2).to(dtype).requires_grad_(),
        "a": drawn(R, IN, seed=5).requires_grad_(),
        "b": drawn(OUT, R, seed=6).requires_grad_(),
        "scaling": 0.5,
    }


def results(y: Tensor, given: dict[str, Any]) -> list[Tensor]:
    y.backward(drawn(*y.shape, seed=7).to(y.dtype))
    return [y.detach(), *(given[name].grad for name in ("x", "bias", "a", "b"))]


@weights
@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_one_node(weight: str, is_lora: bool, dtype: torch.dtype) -> None:
    one, two = (arguments(weight, is_lora, dtype) for _ in range(2))
    expected = results(ops.linear(**one), one)  # x is a leaf
    y = ops.linear(**(two | {"x": two["x"].clone()}))
    assert type(y.grad_fn).__name__ == "_ProductBackward"
    for got, wanted in zip(results(y, two), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_second_backward_has_the_same_bits() -> None:
    given = arguments("nf4", False, torch.bfloat16)
    y = ops.linear(**(given | {"x": given["x"].clone()}))
    first, second = (torch.autograd.grad(y.sum(), [given["a"], given["b"]], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_a_forward_keeps_goes_with_its_backward() -> None:
    given = arguments("nf4", False, torch.bfloat16)
    y = ops.linear(**(given | {"x": given["x"].clone()}))
    assert y.grad_fn.kept.numel() == ROWS * R
    y.sum().backward()
    assert y.grad_fn.kept is None


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The number of calls of each op of ours."""
    calls: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[op.name()] += 1
            return op(*args, **(kwargs or {}))

    with Counting():
        yield calls


@pytest.mark.parametrize(("weight", "op"), [("nf4", "pissa::quantized_linear"), ("dense", "pissa::linear")])
def test_a_checkpoint_leaves_the_last_product_out(weight: str, op: str) -> None:
    first, second = (arguments(weight, False, torch.float32) for _ in range(2))
    second |= {"a": drawn(R, OUT, seed=8).requires_grad_(), "a0": drawn(R, OUT, seed=9)}
    second["weight"] = WEIGHTS[weight](drawn(OUT, OUT, seed=10))

    def block(x: Tensor) -> Tensor:
        hidden = ops.linear(**(first | {"x": x}))
        return hidden + ops.linear(**(second | {"x": hidden}))

    inputs = [drawn(ROWS, IN, seed=0).requires_grad_() for _ in range(2)]
    with counted() as calls:
        y = checkpoint(block, inputs[0].clone(), use_reentrant=False)
        assert calls[op] == 2
        y.sum().backward()
    assert calls[op] == 3  # only the first of the two again
    parameters = [one[name] for one in (first, second) for name in ("bias", "a", "b")]
    got = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    block(inputs[1].clone()).sum().backward()
    for found, leaf in zip([*got, inputs[0].grad], [*parameters, inputs[1]], strict=True):
        assert torch.equal(found, leaf.grad)


def test_a_factor_that_has_changed_is_noticed() -> None:
    given = arguments("nf4", False, torch.float32)
    y = ops.linear(**(given | {"x": given["x"].clone()}))
    with torch.no_grad():
        given["a"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

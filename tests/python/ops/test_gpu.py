"""What only a GPU shows: the same results as on the CPU, streams, graphs, memory. `pytest -m gpu`.

That the ops and the adapter API compute what they should there is tested by the files that test it on the CPU, with
`--device cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import devices
import one_weight
import pissa
from devices import fetch, put
from language_models import FORMS, Make, error, logits, train
from pissa import PissaModel, ops
from reference import energy_loss, power_law

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = ["dense", *ops.formats.FORMATS]


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    """`put` means the GPU here, or with `--device cuda-stand-in` the stand-in, which runs all but those in unrun.py.
    Without a GPU the tests fail otherwise, for they were asked for."""
    before = devices.current
    if devices.on_cpu():
        devices.select("cuda")
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    devices.current = before


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Layer:
    """A layer on the CPU and its twin on the GPU: inputs, a weight in a format or dense, start factors and deltas."""

    def __init__(self, tokens: int, dtype: torch.dtype, form: str = "nf4", side: int = 512, r: int = 16) -> None:
        weight = randn(side, side, seed=1, dtype=dtype) / side**0.5
        self.x = randn(tokens, side, seed=2, dtype=dtype)
        self.dy = randn(tokens, side, seed=3, dtype=dtype)
        self.weight = weight if form == "dense" else ops.quantize(weight, form)
        a, b = randn(r, side, seed=4) / side**0.5, randn(side, r, seed=5) / r**0.5
        self.factors = {"a": 0.1 * a, "b": 0.1 * b, "a0": a, "b0": b}

    def on_gpu(self) -> Layer:
        twin = object.__new__(Layer)
        vars(twin).update(put(vars(self)))
        return twin

    def forward(self) -> Tensor:
        return ops.linear(self.x, self.weight, **self.factors)

    def backward(self) -> tuple[Tensor, ...]:
        """y, dx, dA, dB"""
        x = self.x.detach().requires_grad_()
        trained = {name: self.factors[name].detach().requires_grad_() for name in ("a", "b")}
        y = ops.linear(x, self.weight, **(self.factors | trained))
        return y.detach(), *torch.autograd.grad(y, (x, *trained.values()), self.dy)


# ---- The CPU's results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 512), (33, 65), (1, 1), (7, 4097)])
@pytest.mark.parametrize(("form", "blocksize"), [("nf4", 32), ("nf4", 64), ("nf4", 4096), ("int8", None)])
def test_codes_are_the_cpus(form: str, blocksize: int | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = randn(*shape, dtype=dtype)
    weight[0, :16] = 0
    here = ops.quantize(weight, form, blocksize=blocksize, double_quant=False)
    there = ops.quantize(put(weight), form, blocksize=blocksize, double_quant=False)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.absmax.cpu(), here.absmax)
    for out in DTYPES:
        assert torch.equal(ops.dequantize(there, out).cpu(), ops.dequantize(here, out))


def test_nested_scales_have_the_cpus_bytes() -> None:
    """Given the same mean: torch sums it up in another order on a GPU."""
    absmax, offset = randn(5000).abs(), torch.tensor(0.8)
    for got, want in zip(
        torch.ops.pissa.quantize_absmax(put(absmax), put(offset)),
        torch.ops.pissa.quantize_absmax(absmax, offset),
        strict=True,
    ):
        assert torch.equal(got.cpu(), want)
    nested = ops.quantize(randn(300, 700))
    for dtype in DTYPES:
        assert torch.equal(ops.dequantize(put(nested), dtype).cpu(), ops.dequantize(nested, dtype))
    torch.testing.assert_close(ops.quantize(put(randn(300, 700))).offset.cpu(), nested.offset, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("svd", ["krylov", "subspace"])
@pytest.mark.parametrize("shape", [(384, 512), (512, 384), (90, 700)])
def test_a_seed_gives_the_same_decomposition(shape: tuple[int, int], svd: str, dtype: torch.dtype) -> None:
    """The sketch is the same, so the singular values and the energy found are, up to the products' rounding."""
    weight = power_law(*shape, 0.5).to(dtype)
    _, here, v_here = ops.svd_lowrank(weight, 12, svd=svd, seed=7)
    u, there, v = fetch(ops.svd_lowrank(put(weight), 12, svd=svd, seed=7))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=0)
    assert abs(energy_loss(weight, v) - energy_loss(weight, v_here)) < 1e-5
    for q in (u, v):
        assert (q.double().T @ q.double() - torch.eye(12)).norm() < 1e-5


# ---- Every time the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_has_the_same_bits_every_time(dtype: torch.dtype, tokens: int) -> None:
    layer = Layer(tokens, dtype).on_gpu()
    first = layer.backward()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, layer.backward(), strict=True))


def test_a_decomposition_has_the_same_bits_every_time() -> None:
    weights = [put(power_law(256, 384, 0.5, seed=i).bfloat16()) for i in range(4)]

    def run() -> list[Tensor]:
        splits = ops.split_many(weights, [16] * 4, [1.0] * 4)
        [rest] = ops.residual_many(weights[:1], [splits[0].a0], [splits[0].b0], [1.0], form="nf4")
        return [*(t for split in splits for t in (split.a0, split.b0)), *rest[:4]]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


# ---- Streams and graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 300])
def test_work_is_ordered_by_the_current_stream(tokens: int) -> None:
    """The input is written late on one stream; an op on that stream must wait for it, and a reader for the op."""
    layer = Layer(tokens, torch.bfloat16).on_gpu()
    expected = layer.forward()
    x, layer.x = layer.x, torch.zeros_like(layer.x)
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    ready = torch.cuda.Event()
    with torch.cuda.stream(producer):
        layer.forward()  # takes this stream's memory
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)  # some 30 ms
        layer.x.copy_(x)
        y = layer.forward()
        ready.record()
    assert not ready.query(), "the op waited for the stream"
    with torch.cuda.stream(consumer):
        consumer.wait_event(ready)
        copy = y.clone()
    y.record_stream(consumer)
    consumer.synchronize()
    assert torch.equal(copy, expected)


def test_a_decomposition_on_a_stream_of_its_own() -> None:
    weight = put(power_law(256, 384, 0.5))
    expected = one_weight.split(weight.float(), 8, form="nf4")
    late = torch.zeros_like(weight)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(weight)
        got = one_weight.split(late.float(), 8, form="nf4")
    stream.synchronize()
    for mine, other in zip((*got[:2], *got.residual[:4]), (*expected[:2], *expected.residual[:4]), strict=True):
        assert torch.equal(mine, other)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # handles and workspaces are made outside of the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 4, 16, 300])
def test_forward_and_backward_in_a_graph(tokens: int, form: str) -> None:
    layer = Layer(tokens, torch.bfloat16, form).on_gpu()
    graph, results = captured(layer.backward)
    for seed in (11, 12):
        layer.x.copy_(randn(*layer.x.shape, seed=seed))
        layer.dy.copy_(randn(*layer.dy.shape, seed=seed + 10))
        graph.replay()
        for got, want in zip(results, layer.backward(), strict=True):
            assert torch.equal(got, want)


# ---- Large weights ---------------------------------------------------------------------------------------------------


def test_a_weight_of_more_than_2_to_the_31_elements() -> None:
    side = 50_000
    free, _ = torch.cuda.mem_get_info()
    if free < 16 << 30:
        pytest.skip(f"needs 16 GiB of free GPU memory, here are {free >> 30}")
    weight = torch.empty(side, side, dtype=torch.bfloat16, device=devices.current)
    for first in range(0, side, 10_000):
        weight[first : first + 10_000].normal_()
    quantized = ops.quantize(weight, double_quant=False)
    dense = ops.dequantize(quantized, torch.bfloat16)
    for row in (0, 1, 21_474, 42_949, 42_950, side - 1):  # 2^30 and 2^31 lie in three of these
        rows = weight[row].float().view(1, -1)
        # Blocks start inside a row: compare with those that lie in it, quantised by themselves.
        skip = -row * side % 64
        inside = rows[:, skip : skip + (side - skip) // 64 * 64]
        alone = ops.dequantize(ops.quantize(inside, double_quant=False), torch.bfloat16)
        assert torch.equal(dense[row, skip : skip + inside.shape[1]], alone[0]), row
    x = torch.zeros(2, side, dtype=torch.bfloat16, device=devices.current)
    x[0, 0] = x[1, -1] = 1  # y is the first and the last column
    y = ops.linear(x, quantized)
    assert torch.equal(y[0], dense[:, 0])
    assert torch.equal(y[1], dense[:, -1])


# ---- Models ----------------------------------------------------------------------------------------------------------

forms = pytest.mark.parametrize("form", FORMS)


def adapted(model: nn.Module, form: str) -> PissaModel:
    return pissa.wrap(model, r=4, task_type="CAUSAL_LM", **FORMS[form])


@forms
def test_a_model_wrapped_on_the_cpu_moves(form: str, tiny_llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    here, ids = adapted(tiny_llama().cpu(), form), tokens.cpu()
    expected = logits(here, ids)
    moved = here.to("cuda")
    assert all(tensor.is_cuda for tensor in (*moved.parameters(), *moved.buffers()))
    assert error(logits(moved, tokens).cpu(), expected) < 1e-4
    train(moved, tokens)
    trained = logits(moved, tokens)
    moved.save_pretrained(tmp_path)
    back = PissaModel.from_pretrained(tiny_llama().cpu(), tmp_path)  # what a GPU has trained, on the CPU
    assert error(logits(back, ids), trained.cpu()) < 1e-3
    assert error(logits(moved.to("cpu"), ids), trained.cpu()) < 1e-4


@forms
def test_a_step_of_training_is_the_cpus(form: str, tiny_llama: Make, tokens: Tensor) -> None:
    """From one and the same adapter, so that no decomposition lies between."""
    here = adapted(tiny_llama().cpu(), form)
    there = adapted(tiny_llama().cpu(), form).to("cuda")
    for got, want in zip(train(there, tokens), train(here, tokens.cpu()), strict=True):
        assert got == pytest.approx(want, rel=1e-3)

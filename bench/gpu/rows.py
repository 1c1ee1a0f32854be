"""Rows about one layer on a GPU: training and decoding with it, and NF4 compared with a copy.

All of them also run on the CPU, with small sizes, to test that they run. The ratios mean nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor

from bench.compare.interleave import Call, Case, Clock, Row, agree, in_turns, require
from bench.compare.peers import bnb_linear, lora_layer
from bench.compare.records import missing
from bench.compare.rows_linear import BFLOAT16_BOUND, Layer, against_dense, dequantise_case, quantise_case
from pissa import ops

R = 64
IN_A_GRAPH = 16  # layers in one CUDA graph, 134 MB of NF4: no cache holds them


def linear_rows(size: int, device: str, clock: Clock) -> Iterator[Row]:
    """`size`: of the layers' weights, 4096. The others follow from it."""
    small = size < 4096
    for tokens, forward_goal, backward_goal in ((2048, 1.5, 1.4), (8192, 1.3, 1.3)):
        count = tokens // 64 if small else tokens
        for work, goal in (("forward", forward_goal), ("backward", backward_goal)):
            build = partial(_train, work, size, count, device, clock)
            yield Row(f"{work}, nf4, r = {R}, M = {tokens}", "PEFT + bitsandbytes, the better adapters", build, goal)
    count = 128 if small else 8192
    for work, against, backward, goal in (
        ("forward", "dense bfloat16, torch", False, 0.93),
        ("forward + backward", "two dense bfloat16 products, torch", True, None),
    ):
        build = partial(against_dense, size, count, R, backward, device, 2)
        yield Row(f"{work}, nf4, r = {R}, M = 8192", against, build, goal)


def nf4_rows(size: int, device: str) -> Iterator[Row]:
    shape = (size, size) if size < 4096 else (11008, 4096)
    name = f"{shape[0]} x {shape[1]}"
    yield Row(f"dequantise, {name}", "a copy of as many bytes", partial(_dequantise_bytes, shape, device), 0.85)
    stored = lambda: dequantise_case([ops.quantize(weight) for weight in _weights(shape, device)])  # noqa: E731
    yield Row(f"dequantise, {name}", "bitsandbytes", stored)
    dense = lambda: quantise_case(_weights(shape, device))  # noqa: E731
    yield Row(f"quantise, {name}, nested scales", "bitsandbytes", dense, 1.0)
    yield Row(f"quantise, {name}, the kernel", "a copy of as many bytes", partial(_quantise_bytes, shape, device), 0.7)


def decode_rows(size: int, device: str) -> Iterator[Row]:
    """Of 4096 x 4096 the base is 8.65 MB and the four float32 factors are 4.19: for a few tokens, bound by reading
    them, no adapted layer is faster than 0.67 of its bare base."""
    for tokens, peft_goal, base_goal in ((1, 1.2, 0.6), (4, 1.2, 0.6), (16, 2.0, 1.2), (32, 1.2, 0.9), (64, 1.0, 0.8)):
        yield Row(
            f"decoding, nf4, r = {R}, M = {tokens}",
            "PEFT + bitsandbytes, bfloat16 adapters",
            partial(_decode, True, size, tokens, device),
            peft_goal,
        )
        yield Row(
            f"decoding, nf4, r = {R}, M = {tokens}",
            "bitsandbytes, the base without an adapter",
            partial(_decode, False, size, tokens, device),
            base_goal,
        )


@cache
def model_weight(rows: int, cols: int, seed: int, device: str) -> Tensor:
    """A bfloat16 weight with a language model's spectrum: noise, and 256 directions that fall off as a power law.

    It is weights.hard_spectrum with directions that are only nearly orthogonal, which cost nothing to make.
    """
    generator = torch.Generator(device).manual_seed(seed)
    spikes = min(256, rows, cols)
    noise = torch.randn(rows, cols, generator=generator, device=device) / max(rows, cols) ** 0.5
    u, v = (torch.randn(n, spikes, generator=generator, device=device) / n**0.5 for n in (rows, cols))
    return torch.addmm(noise, u * 8 * torch.arange(1, spikes + 1, device=device) ** -0.5, v.T).bfloat16()


# ---- One layer -------------------------------------------------------------------------------------------------------


class Peer:
    """PEFT's layer over bitsandbytes' on the same bytes; float32 adapters under autocast, as PEFT trains by default."""

    def __init__(self, ours: Layer, dtype: torch.dtype, device: str) -> None:
        self.layer = lora_layer(bnb_linear(ours.weight), *ours.factors, dtype)
        self.trained = (self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight)
        self.x = ours.x.detach().clone().requires_grad_()
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=dtype == torch.float32)
        require(self.trained[0].device.type == device, f"PEFT's adapter is on {self.trained[0].device}")

    def forward(self) -> Tensor:
        with self.autocast():
            return self.layer(self.x)


def _backward(y: Tensor, leaves: Sequence[Tensor], dy: Tensor) -> Call:
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _train(work: str, size: int, tokens: int, device: str, clock: Clock) -> Case:
    layers = [Layer(size, size, tokens, R, device) for _ in range(4)]
    if work == "forward":
        ours = in_turns([layer.forward for layer in layers])
    else:
        ours = in_turns(
            [_backward(layer.forward(), (layer.x, layer.delta_a, layer.delta_b), layer.dy) for layer in layers]
        )
    if lacking := missing("peft", "bitsandbytes"):
        return Case(ours, None, lambda: layers[0].check(layers[0].formula()), no_peer=lacking)
    peers = {
        "bfloat16 adapters": [Peer(layer, torch.bfloat16, device) for layer in layers],
        "float32 adapters under autocast": [Peer(layer, torch.float32, device) for layer in layers],
    }
    if work == "forward":
        sides = {name: in_turns([peer.forward for peer in group]) for name, group in peers.items()}
    else:
        sides = {
            name: in_turns(
                [_backward(p.forward(), (p.x, *p.trained), layer.dy) for p, layer in zip(group, layers, strict=True)]
            )
            for name, group in peers.items()
        }
    times = {name: median(clock(call, 5) for _ in range(4)) for name, call in sides.items()}
    better = min(times, key=lambda name: times[name])

    def check() -> str:
        found = []
        for group in peers.values():
            peer = group[0]
            y = peer.forward()
            found.append(layers[0].check((y, *torch.autograd.grad(y, (peer.x, *peer.trained), layers[0].dy))))
        return f"{better}; {max(found)}; " + ", ".join(f"{name}: {ms:.3g} ms" for name, ms in times.items())

    return Case(ours, sides[better], check)


def _in_a_graph(calls: Sequence[Call], device: str) -> tuple[Call, bool]:
    """One call that makes all `calls` in their order, and whether it is a CUDA graph. On the CPU, and if the capture
    fails, it is none."""

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [call() for call in calls]

    if device == "cpu":
        return run, False
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # handles and workspaces are made outside of the graph
        for _ in range(3):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    except RuntimeError:
        torch.cuda.set_stream(current)  # a capture that fails leaves another one
        torch.cuda.synchronize()
        return run, False

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay, True


def _decode(peer_has_adapter: bool, size: int, tokens: int, device: str) -> Case:
    """Ours has the adapter. The peer's layer has one too, or is its base alone and computes less than ours."""
    count = 2 if size < 4096 else IN_A_GRAPH
    layers = [Layer(size, size, tokens, R, device) for _ in range(count)]
    inputs = [layer.x.detach() for layer in layers]
    ours, captured = _in_a_graph([layer.forward for layer in layers], device)
    if lacking := missing("peft", "bitsandbytes") if peer_has_adapter else missing("bitsandbytes"):
        return _decode_alone(layers, ours, captured or device == "cpu", lacking)
    modules = [bnb_linear(layer.weight) for layer in layers]
    if peer_has_adapter:
        pairs = zip(modules, layers, strict=True)
        modules = [lora_layer(module, *layer.factors, torch.bfloat16) for module, layer in pairs]
    calls = [partial(module.eval(), x) for module, x in zip(modules, inputs, strict=True)]
    theirs, peer_captured = _in_a_graph(calls, device)

    def check() -> str:
        bases = [ops.linear(x, layer.weight) for x, layer in zip(inputs, layers, strict=True)]
        same = ours() if peer_has_adapter else bases
        bounds = [agree(BFLOAT16_BOUND, y=pair) for pair in zip(same, theirs(), strict=True)]
        require(captured or device == "cpu", "ours could not be captured into a CUDA graph")
        graphs = "in a CUDA graph" if peer_captured else "ours in a CUDA graph, the peer could not be captured"
        how = graphs if captured else "one after the other"
        return f"of one layer, {count} different ones {how}; {max(bounds)}"

    return Case(ours, theirs, check, units=count)


def _decode_alone(layers: Sequence[Layer], ours: Call, captured: bool, lacking: str) -> Case:
    def check() -> str:
        require(captured, "ours could not be captured into a CUDA graph")
        return max(agree(BFLOAT16_BOUND, y=(y, layer.formula()[0])) for y, layer in zip(ours(), layers, strict=True))

    return Case(ours, None, check, units=len(layers), no_peer=lacking)


# ---- NF4 -------------------------------------------------------------------------------------------------------------


def _weights(shape: tuple[int, int], device: str) -> list[Tensor]:
    return [model_weight(*shape, seed, device) for seed in range(4)]


def _copies(bytes_moved: float, device: str) -> Call:
    """A copy within the device's memory that reads and writes the same total number of bytes."""
    half = int(bytes_moved / 2)
    pairs = [torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(4)]
    return in_turns([partial(pair[1].copy_, pair[0]) for pair in pairs])


def _bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _dequantise_bytes(shape: tuple[int, int], device: str) -> Case:
    weights = [ops.quantize(weight) for weight in _weights(shape, device)]
    calls = [partial(ops.dequantize, weight, torch.bfloat16) for weight in weights]
    moved = _bytes_of(*weights[0][:4], calls[0]())

    def check() -> str:
        here = ops.QuantizedWeight(*(None if part is None else part.cpu() for part in weights[0][:4]), *weights[0][4:])
        require(torch.equal(calls[0]().cpu(), ops.dequantize(here, torch.bfloat16)), "differs from the CPU's")
        return f"the CPU's bits; {moved / 1e6:.1f} MB"

    return Case(in_turns(calls), _copies(moved, device), check)


def _quantise_bytes(shape: tuple[int, int], device: str) -> Case:
    weights = _weights(shape, device)
    calls = [partial(torch.ops.pissa.quantize, weight, "nf4", 64) for weight in weights]
    moved = _bytes_of(weights[0], *calls[0]())

    def check() -> str:
        for got, want in zip(calls[0](), torch.ops.pissa.quantize(weights[0].cpu(), "nf4", 64), strict=True):
            require(torch.equal(got.cpu(), want), "differs from the CPU's")
        return f"the CPU's bits; plain scales, {moved / 1e6:.1f} MB"

    return Case(in_turns(calls), _copies(moved, device), check)

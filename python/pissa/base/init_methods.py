"""Where an adapter starts: the factors of a weight by PiSSA and, to compare with it, by other initialisations.

A method is a class in `INIT_METHODS`; `PissaConfig.init` names it.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pissa import ops
from pissa.base.start import Origin
from pissa.config import Form, PissaConfig
from pissa.ops.checks import check_weights

Factors = tuple[Tensor, Tensor]
"""a0 [r, in] and b0 [out, r], float32; the principal part, or what is in its place, is scaling * b0 @ a0."""


class InitMethod(ABC):
    """A way to start an adapter."""

    name: ClassVar[str]
    """What `PissaConfig.init` calls it."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What the method needs beside the weight. `model.decompose`, which has only weights, refuses a method that needs
    more."""

    fields: ClassVar[tuple[str, ...]] = ("svd", "svd_passes", "seed")
    """The fields of the configuration that are the identity of a start; see `identity`."""

    is_taken_out: ClassVar[bool] = True
    """Whether a stored residual lacks the start: it is W - s B0 A0. False: it is all of W."""

    copies: ClassVar[bool] = False
    """Whether the method makes dense copies, in float32, of all weights that it is given."""

    def identity(self, config: PissaConfig) -> tuple[tuple[str, Any], ...]:
        """What of the configuration determines the start, beside rank, scaling and `use_adalora`: names and values.
        Adapters of a layer that agree on it share their start; it is part of pissa.json."""
        return tuple((name, getattr(config, name)) for name in self.fields)

    @abstractmethod
    def start(
        self, weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
    ) -> list[Factors]:
        """The factors for each weight; the arguments and errors are those of `start_factors`."""


class Pissa(InitMethod):
    """The leading r singular triplets, of `ops.split_many` (arXiv 2404.02948, eq. 2-3)."""

    name = "pissa"

    def start(
        self, weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
    ) -> list[Factors]:
        splits = ops.split_many(
            weights,
            [origin.r for origin in origins],
            [origin.scaling for origin in origins],
            svd=config.svd,
            passes=config.svd_passes,
            seed=config.seed,
            names=[f"layer {name}: weight" for name in names],
        )
        return [(split.a0, split.b0) for split in splits]


class LoftQ(Pissa):
    """The principal part of what the quantisation loses, W - quantised(W) (arXiv 2310.08659, one alternation)."""

    name = "loftq"
    fields = (*Pissa.fields, "quant", "blocksize", "double_quant")
    is_taken_out = False
    copies = True

    def start(
        self, weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
    ) -> list[Factors]:
        return super().start(_lost(weights, config.form, names), origins, config, names)


class _OneByOne(InitMethod):
    """A method that takes each finite weight by itself. Where it decomposes, torch makes the host wait for a GPU."""

    def start(
        self, weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
    ) -> list[Factors]:
        check_weights(weights, [f"layer {name}: weight" for name in names])
        return [
            self.factors(weight.detach(), origin, config.seed, name)
            for weight, origin, name in zip(weights, origins, names, strict=True)
        ]

    @abstractmethod
    def factors(self, weight: Tensor, origin: Origin, seed: int, name: str) -> Factors:
        """The factors of one weight."""


class _Triplets(_OneByOne):
    """r singular triplets in a row, by a full SVD (figure 8)."""

    def factors(self, weight: Tensor, origin: Origin, seed: int, name: str) -> Factors:
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        first = self.first(len(s) - origin.r)
        part = slice(first, first + origin.r)
        root = (s[part] / origin.scaling).sqrt()
        return root[:, None] * vh[part], u[:, part] * root

    @abstractmethod
    def first(self, last: int) -> int:
        """The number of the first triplet; `last` is the greatest that leaves r of them."""


class PissaMedium(_Triplets):
    """The triplets in the middle of the spectrum."""

    name = "pissa_medium"

    def first(self, last: int) -> int:
        return last // 2


class PissaMinor(_Triplets):
    """The triplets at the end of the spectrum."""

    name = "pissa_minor"

    def first(self, last: int) -> int:
        return last


class Lora(InitMethod):
    """A as nn.Linear's, B = 0 (arXiv 2106.09685). The random factor depends on the layer's name and the seed only."""

    name = "lora"

    def start(
        self, weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
    ) -> list[Factors]:
        check_weights(weights, [f"layer {name}: weight" for name in names])
        drawn = []
        for weight, origin, name in zip(weights, origins, names, strict=True):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ config.seed)
            bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform_(a=sqrt(5)), nn.Linear's
            drawn.append((2 * torch.rand(origin.r, weight.shape[1], generator=generator) - 1) * bound)
        return [
            (a0, torch.zeros(weight.shape[0], origin.r, device=weight.device))
            for a0, weight, origin in zip(_sent(drawn, weights), weights, origins, strict=True)
        ]


class Olora(_OneByOne):
    """The first r columns and rows of Q R = W (arXiv 2406.01775)."""

    name = "olora"

    def factors(self, weight: Tensor, origin: Origin, seed: int, name: str) -> Factors:
        q, upper = torch.linalg.qr(weight.float())
        return upper[: origin.r].contiguous(), q[:, : origin.r].contiguous()


class Given(InitMethod):
    """No method: the factors come from other adapters or from a plain LoRA."""

    name = "given"
    needs = ("factors",)

    def start(
        self, weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
    ) -> list[Factors]:
        raise NotImplementedError("an adapter whose factors are given is not started from weights")


INIT_METHODS: Mapping[str, InitMethod] = {
    method.name: method for method in (Pissa(), PissaMedium(), PissaMinor(), Lora(), Olora(), LoftQ(), Given())
}


def start_factors(
    weights: Sequence[Tensor], origins: Sequence[Origin], config: PissaConfig, names: Sequence[str]
) -> list[Factors]:
    """The factors that adapters of these weights [out, in] start from, by the method that `config.init` names.

    Args:
        weights: any dtype that `ops.split` takes.
        origins: rank and scaling of each.
        names: what messages call the layers.

    Raises:
        ValueError: NaN or Inf in a weight, naming it.
    """
    factors = INIT_METHODS[config.init].start(weights, origins, config, names)
    return [_unit(*pair) for pair in factors] if config.use_adalora else factors


def _sent(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors of the CPU where the weights are, all on one device. They go there in one copy, since the host waits for
    the GPU at each."""
    if not weights or weights[0].device.type == "cpu":
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(weights[0].device)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).clone() for part, tensor in zip(parts, tensors, strict=True)]


def _lost(weights: Sequence[Tensor], form: Form, names: Sequence[str]) -> list[Tensor]:
    """The errors of weights that are quantised in that form: as residuals of nothing, so that all are queued before
    the host waits."""
    quantised = ops.residual_many(
        weights,
        [weight.new_zeros(1, weight.shape[1], dtype=torch.float32) for weight in weights],
        [weight.new_zeros(weight.shape[0], 1, dtype=torch.float32) for weight in weights],
        [1.0] * len(weights),
        names=[f"layer {name}: weight" for name in names],
        **form.options(),
    )
    lost = []
    for weight, code in zip(weights, quantised, strict=True):
        assert isinstance(code, ops.QuantizedWeight)  # LoftQ is refused without `quant`
        lost.append(weight.float() - ops.dequantize(code))
    return lost


def _unit(a0: Tensor, b0: Tensor) -> Factors:
    """The same product with columns of length 1 in b0: singular vectors there, singular values in a0's rows."""
    length = b0.norm(dim=0)
    return a0 * length[:, None], b0 / length.where(length > 0, 1)

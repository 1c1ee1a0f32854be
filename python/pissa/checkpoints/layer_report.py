"""What one matrix after the other holds for PiSSA: its spectrum, and the error of each way to quantise it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pissa.checkpoints.budget import kinds_of
from pissa.checkpoints.quant_errors import PLAIN, quant_errors
from pissa.checkpoints.spectrum import Spectrum, spectrum_of

Method = tuple[str, int]
"""A way to quantise and its rank, 0 if it has no factors."""


@dataclass(frozen=True)
class LayerReport:
    """What was found out about the matrix of one layer."""

    name: str
    shape: tuple[int, int]
    spectrum: Spectrum
    errors: dict[Method, float]
    """‖W - Q - s B A‖², Frobenius. Empty if nothing was to be quantised."""

    def rank(self, wanted: int) -> int:
        """The rank that the layer gets where `wanted` is asked for: at most its smaller side."""
        return min(wanted, *self.shape)

    def parameters(self, rank: int) -> int:
        """What an adapter of that rank trains here."""
        return self.rank(rank) * sum(self.shape)


def layer_reports(
    matrices: Iterable[tuple[str, Tensor]],
    known: int,
    ranks: Sequence[int] = (),
    *,
    quant: str | None = None,
    quantised: Callable[[str], bool] = lambda name: True,
    exact: bool = False,
) -> Iterator[LayerReport]:
    """Looks at one matrix after the other. Nothing of a matrix is kept.

    Args:
        matrices: name and matrix [out, in] of each layer.
        known: how many singular values of each are wanted; of a smaller matrix, all.
        ranks: of the factors, where something is quantised.
        quant: the format of which errors are wanted.
        quantised: of which layers; of all by default.
        exact: compute all singular values.

    Raises:
        ValueError: NaN or Inf, naming the layer.
    """
    for name, matrix in matrices:
        try:
            yield _layer_report(name, matrix, known, ranks, quant if quantised(name) else None, exact)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        del matrix


def _layer_report(
    name: str, matrix: Tensor, known: int, ranks: Sequence[int], quant: str | None, exact: bool
) -> LayerReport:
    shape = (matrix.shape[0], matrix.shape[1])
    spectrum = spectrum_of(matrix, min(known, *shape), exact=exact)
    found = () if quant is None else quant_errors(matrix, quant, ranks)
    return LayerReport(name, shape, spectrum, {(method, rank): error for method, rank, error in found})


@dataclass(frozen=True)
class Summary:
    """Several layers together."""

    layers: Sequence[LayerReport]

    @property
    def total(self) -> float:
        """The square of the Frobenius norm of all weights."""
        return sum(layer.spectrum.total for layer in self.layers)

    def energy(self, rank: int) -> float:
        """The share of the square of the norm that `rank` directions in each layer hold."""
        lost = sum(layer.spectrum.lost(layer.rank(rank)) for layer in self.layers)
        return 1 - lost / self.total if self.total else 1.0

    @property
    def methods(self) -> list[Method]:
        """The methods whose errors are known."""
        return list(dict.fromkeys(method for layer in self.layers for method in layer.errors))

    @property
    def quantised(self) -> list[LayerReport]:
        """The layers whose errors are known."""
        return [layer for layer in self.layers if layer.errors]

    def error(self, method: Method) -> float:
        """The Frobenius norm of the error, in units of that of the weights; 0 for weights of zeros."""
        total = sum(layer.spectrum.total for layer in self.quantised)
        return math.sqrt(sum(layer.errors[method] for layer in self.quantised) / total) if total else 0.0

    def removed(self, method: Method) -> float:
        """The share of plain quantisation's error that is gone."""
        plain = self.error((PLAIN, 0))
        return 1 - self.error(method) / plain if plain else 0.0


def by_kind(layers: Sequence[LayerReport]) -> dict[str, Summary]:
    """The layers of each kind together."""
    members: dict[str, list[LayerReport]] = {}
    for layer, kind in zip(layers, kinds_of(layer.name for layer in layers).values(), strict=True):
        members.setdefault(kind, []).append(layer)
    return {kind: Summary(some) for kind, some in members.items()}

"""Starts from singular triplets of a full SVD: the principal ones, for the paper's table 6, and others, for its
figure 8; and from the singular vectors alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import pissa
from pissa.base.init_methods import start_factors


class Triplets(pissa.InitMethod):
    """r consecutive singular triplets, by a full SVD of each weight.

    Args:
        first: the number of the first triplet, given the largest number that leaves r of them.
    """

    fields = ()

    def __init__(self, name: str, first: Callable[[int], int]) -> None:
        self.name, self._first = name, first

    def start(self, task: pissa.StartTask) -> list[pissa.StartFactors]:
        starts = []
        for weight, origin in zip(task.weights, task.origins, strict=True):
            u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            first = self._first(len(s) - origin.r)
            part = slice(first, first + origin.r)
            root = (s[part] / origin.scaling).sqrt()
            starts.append(pissa.StartFactors(root[:, None] * vh[part], u[:, part] * root, origin))
        return starts


class Orthonormal(pissa.InitMethod):
    """PiSSA's directions: its start, whose rows of a0 and columns of b0 have length 1 instead, for any scaling. A
    component that is zero, whose row is random, stays as it is."""

    name = "unit"

    def start(self, task: pissa.StartTask) -> list[pissa.StartFactors]:
        config = dataclasses.replace(task.config, init="pissa")
        return [_with_unit_lengths(start) for start in start_factors(task._replace(config=config))]


def _with_unit_lengths(start: pissa.StartFactors) -> pissa.StartFactors:
    """Each element is rounded once."""
    rows, columns = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in (start.a0, start.b0.mT))
    rows, columns = (length.where(columns > 0, 1) for length in (rows, columns))
    return pissa.StartFactors((start.a0 / rows[:, None]).float(), (start.b0 / columns).float(), start.origin)


UNIT = Orthonormal()
EXACT = Triplets("exact", lambda last: 0)
MEDIUM, MINOR = Triplets("medium", lambda last: last // 2), Triplets("minor", lambda last: last)

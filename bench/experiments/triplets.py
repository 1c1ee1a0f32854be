"""Starts from singular triplets of a full SVD: the principal ones, for the paper's table 6, and others, for its
figure 8."""

from __future__ import annotations

from collections.abc import Callable

import torch

import pissa


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


EXACT = Triplets("exact", lambda last: 0)
MEDIUM, MINOR = Triplets("medium", lambda last: last // 2), Triplets("minor", lambda last: last)

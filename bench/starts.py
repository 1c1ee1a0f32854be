"""Starts that measurements compare with PiSSA's, as rows of `pissa.INIT_METHODS`: the minor components, and PiSSA's
directions without their lengths."""

from __future__ import annotations

import dataclasses

import torch

import pissa
from pissa.base.init_methods import start_factors


class Minor(pissa.InitMethod):
    """The r least singular triplets, by a full SVD of each weight (MiLoRA, arXiv 2406.09044)."""

    name = "minor"
    fields = ()

    def start(self, task: pissa.StartTask) -> list[pissa.StartFactors]:
        starts = []
        for weight, origin in zip(task.weights, task.origins, strict=True):
            u, s, vh = (part.detach() for part in torch.linalg.svd(weight.float(), full_matrices=False))
            root = (s[-origin.r :] / origin.scaling).sqrt()
            starts.append(pissa.StartFactors(root[:, None] * vh[-origin.r :], u[:, -origin.r :] * root, origin))
        return starts


class Orthonormal(pissa.InitMethod):
    """PiSSA's directions: its start, whose rows of a0 and columns of b0 have length 1 instead, for any scaling. A
    component that is zero, whose row is random, stays as it is."""

    name = "orthonormal"

    def start(self, task: pissa.StartTask) -> list[pissa.StartFactors]:
        config = dataclasses.replace(task.config, init="pissa")
        return [_with_unit_lengths(start) for start in start_factors(task._replace(config=config))]


def _with_unit_lengths(start: pissa.StartFactors) -> pissa.StartFactors:
    """Each element is rounded once."""
    rows, columns = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in (start.a0, start.b0.mT))
    rows, columns = (length.where(columns > 0, 1) for length in (rows, columns))
    return pissa.StartFactors((start.a0 / rows[:, None]).float(), (start.b0 / columns).float(), start.origin)


pissa.INIT_METHODS.update({method.name: method for method in (Minor(), Orthonormal())})

"""The second moments that a calibration found for the inputs of a model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SecondMoments(Protocol):
    """Provides second moments of the inputs of a model's layers."""

    def of(self, names: Iterable[str], device: torch.device) -> list[Tensor]:
        """Returns the second moments of the named layers, [in, in], on a device."""


@dataclass(frozen=True)
class Calibration:
    """The second moments of the layers' inputs."""

    moments: Mapping[str, Tensor]
    """R = E[xᵀx] by the layer's name, symmetric float32 [in, in], on the device where the layer computes. Layers
    with the same inputs share one tensor."""
    tokens: int
    """The number of tokens over which the mean was taken; for experts, the tokens of all experts together."""

    def of(self, names: Iterable[str], device: torch.device) -> list[Tensor]:
        """Returns the moments of the named layers, [in, in], on a device.

        Raises:
            ValueError: a layer was not calibrated. The message names it.
        """
        moments = []
        for name in names:
            if name not in self.moments:
                raise ValueError(
                    f"calibration: has no layer {name}; calibrate with the target_modules of the adapter, or give wrap "
                    "the batches themselves"
                )
            moments.append(self.moments[name].to(device))
        return moments

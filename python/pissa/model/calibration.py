"""What a calibration has found of the inputs of a model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """The second moments of the layers' inputs."""

    moments: Mapping[str, Tensor]
    """R = E[xᵀx] by the layer's name, float32 [in, in], symmetric, where the layer computes. Layers with the same
    inputs have the same tensor."""
    tokens: int
    """Over which the mean was taken; of experts, those of all of them."""

    def of(self, names: Iterable[str]) -> list[Tensor]:
        """The moments of layers of these names.

        Raises:
            ValueError: naming a layer that was not calibrated.
        """
        found = []
        for name in names:
            if name not in self.moments:
                raise ValueError(
                    f"calibration: has no layer {name}; calibrate with the target_modules of the adapter, or give wrap "
                    "the batches themselves"
                )
            found.append(self.moments[name])
        return found

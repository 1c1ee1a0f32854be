"""What a calibration has found of the inputs of a model's layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pissa.files.messages import reading
from pissa.files.staged import staged
from pissa.files.tensor_file import TensorFile, write_tensors

_TOKENS = "tokens"


class Inputs(Protocol):
    """What is known of the inputs of a model's layers."""

    def of(self, names: Iterable[str], device: torch.device) -> list[Tensor]:
        """The second moments of layers of these names, [in, in], on a device."""


@dataclass(frozen=True)
class Calibration:
    """The second moments of the layers' inputs."""

    moments: Mapping[str, Tensor]
    """R = E[xᵀx] by the layer's name, float32 [in, in], symmetric, where the layer computes; or its diagonal alone,
    [in]. Layers with the same inputs have the same tensor."""
    tokens: int
    """Over which the mean was taken; of experts, those of all of them."""

    @property
    def diagonal(self) -> bool:
        """Whether there are diagonals alone."""
        return any(moment.dim() == 1 for moment in self.moments.values())

    def of(self, names: Iterable[str], device: torch.device) -> list[Tensor]:
        """The moments of layers of these names, [in, in], on a device.

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
            moment = self.moments[name].to(device)
            found.append(moment if moment.dim() == 2 else moment.diag())
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: each moment under the names of its layers, with blanks between."""
        names: dict[int, list[str]] = {}
        for name, moment in self.moments.items():
            names.setdefault(moment.data_ptr(), []).append(name)
        tensors = {" ".join(some): self.moments[some[0]] for some in names.values()}
        with staged(Path(path).parent) as new:
            write_tensors(new(Path(path).name), tensors | {_TOKENS: torch.tensor(self.tokens)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Reads what `save` has written: the moments are views of the mapped file.

        Raises:
            ValueError: naming the file, and what is wrong with it.
        """
        file = TensorFile(Path(path))
        with reading(Path(path), "a file that Calibration.save has written"):
            file.expect_checksums()
            moments = {names: file.read(names) for names in file.entries if names != _TOKENS}
            found = {name: moment for names, moment in moments.items() for name in names.split()}
            return Calibration(found, int(file.read(_TOKENS)))

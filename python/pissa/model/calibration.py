"""The second moments that a calibration found for the inputs of a model's layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pissa.containers.messages import file_errors
from pissa.containers.staged import staged
from pissa.containers.tensor_file import TensorFile, write_tensors

_TOKENS = "tokens"


class SecondMoments(Protocol):
    """Provides second moments of the inputs of a model's layers."""

    def of(self, names: Iterable[str], device: torch.device) -> list[Tensor]:
        """Returns the second moments of the named layers, [in, in], on a device."""


@dataclass(frozen=True)
class Calibration:
    """The second moments of the layers' inputs."""

    moments: Mapping[str, Tensor]
    """R = E[xᵀx] by the layer's name, symmetric float32 [in, in], on the device where the layer computes, or only its
    diagonal, [in]. Layers with the same inputs share one tensor."""
    tokens: int
    """The number of tokens over which the mean was taken; for experts, the tokens of all experts together."""

    @property
    def diagonal(self) -> bool:
        """Whether only diagonals are stored."""
        return any(moment.dim() == 1 for moment in self.moments.values())

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
            moment = self.moments[name].to(device)
            moments.append(moment if moment.dim() == 2 else moment.diag())
        return moments

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file. Each moment is stored under the names of its layers, separated by blanks."""
        names: dict[int, list[str]] = {}
        for name, moment in self.moments.items():
            names.setdefault(moment.data_ptr(), []).append(name)
        tensors = {" ".join(sharing): self.moments[sharing[0]] for sharing in names.values()}
        with staged(Path(path).parent) as new:
            write_tensors(new(Path(path).name), tensors | {_TOKENS: torch.tensor(self.tokens)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Reads a file that `save` has written. The moments are views of the mapped file.

        Raises:
            ValueError: the file is wrong. The message names it and the problem.
        """
        file = TensorFile(Path(path))
        with file_errors(Path(path), "a file that Calibration.save has written"):
            file.expect_checksums()
            tensors = {names: file.read(names) for names in file.entries if names != _TOKENS}
            moments = {name: moment for names, moment in tensors.items() for name in names.split()}
            return Calibration(moments, int(file.read(_TOKENS)))

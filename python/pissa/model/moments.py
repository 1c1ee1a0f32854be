"""The second moments of what the layers of a model read, block by block: only one block's moments are in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from torch import Tensor

from pissa.base.digest import fingerprint, xxh3_of_text
from pissa.model.calibrate import Batch, observe_blocks


class BlockMoments:
    """The second moments of the inputs of a model's layers, as in `Calibration`. They are computed in the order of the
    blocks, and wait in memory until they are requested. Each may be requested once.

    Args:
        wrapped: the model. Its adapter may still lack its start. Its layers must stay as they are until `close`.
        batches: the model's inputs, as `pissa.calibrate` takes them.
        wanted: the names of the layers that will be requested.
    """

    def __init__(self, wrapped: PeftModel, batches: Iterable[Batch], wanted: Iterable[str]) -> None:
        self._blocks = observe_blocks(wrapped, batches)
        self._waiting: dict[str, Tensor] = {}
        self._wanted = set(wanted)

    def of(self, names: Iterable[str], device: torch.device) -> list[Tensor]:
        """Returns the moments of these layers, [in, in], on a device.

        Raises:
            ValueError: `pissa.calibrate` would refuse the model or the batches, or a layer is not linear.
        """
        names = list(names)
        while lacking := [name for name in names if name not in self._waiting]:
            if (block := next(self._blocks, None)) is None:
                raise ValueError(f"calibration: has no layer {lacking[0]}; leave it out with exclude_modules")
            found = block.moments
            self._waiting |= {name: moment for name, moment in found.items() if name in self._wanted}
        return [self._waiting.pop(name).to(device) for name in names]

    def close(self) -> None:
        """Ends the passes through the model, wherever they are."""
        self._blocks.close()


def digest_of(batches: Iterable[Batch]) -> str:
    """The XXH3-128 of all tensors of the batches. A run can only be continued with the same ones."""
    known: dict[str, str] = {}
    for number, batch in enumerate(batches):
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if isinstance(batch, Mapping):  # anything else is refused when it is read
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            known |= {f"{number} {name}": fingerprint(value) for name, value in tensors.items()}
    return xxh3_of_text(" ".join(f"{name} {value}" for name, value in known.items()))

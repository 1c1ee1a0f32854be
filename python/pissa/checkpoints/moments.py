"""What the layers of a checkpoint read, block after block: the model runs over its mapped files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from pissa.base.digest import Fingerprint, fingerprint, read, xxh3_of_text
from pissa.checkpoints.load import mapped_model
from pissa.config import PissaConfig
from pissa.files.tensor_file import Source
from pissa.model.calibrate import Batch, in_blocks
from pissa.model.inject import own_config
from pissa.model.pissa_model import model_class


class Moments:
    """The second moments of the inputs of a checkpoint's layers. They are found in the order of the blocks, and those
    that are not asked for yet wait in memory.

    Args:
        config: of the adapter.
        batches: what the model reads, as `pissa.calibrate` takes it.
        wanted: the layers, by name.
    """

    def __init__(self, source: Source, config: PissaConfig, batches: Iterable[Batch], wanted: Iterable[str]) -> None:
        config, (model, _, _) = own_config(config), mapped_model(source, None)
        self._blocks = in_blocks(model_class(config)(model, config, "default"), batches)
        self._waiting: dict[str, Tensor] = {}
        self._wanted = set(wanted)

    def of(self, names: Iterable[str]) -> list[Tensor]:
        """The moments of these layers, each of which may be asked for once.

        Raises:
            ValueError: what `pissa.calibrate` refuses of the model and the batches.
        """
        names = list(names)
        while not self._waiting.keys() >= set(names):
            found = next(self._blocks).moments
            self._waiting |= {name: moment for name, moment in found.items() if name in self._wanted}
        return [self._waiting.pop(name) for name in names]


def digest_of(batches: Iterable[Batch]) -> str:
    """The XXH3-128 of all tensors of the batches: a run goes on with these alone."""
    known: dict[str, Fingerprint] = {}
    for number, batch in enumerate(batches):
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if isinstance(batch, Mapping):  # anything else is refused when it is read
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            known |= {f"{number} {name}": fingerprint(value) for name, value in tensors.items()}
    texts = zip(known, read(list(known.values())), strict=True)
    return xxh3_of_text(" ".join(f"{name} {text}" for name, text in texts))

"""The dense weights of a model that bitsandbytes has quantised. With them, the error of its codes is repaired."""

from __future__ import annotations

from torch import Tensor

from pissa import ops
from pissa.base.digest import fingerprint
from pissa.base.init_methods import INIT_METHODS
from pissa.base.protocol import Base
from pissa.config import PissaConfig
from pissa.containers.checkpoint import Checkpoint, Contents
from pissa.containers.hub import Name


class OriginalWeights:
    """The checkpoint that a model was quantised from. It is mapped, and one matrix is read at a time.

    Args:
        weights: its folder, or its name on the Hub.

    Raises:
        ValueError: it is not a checkpoint of dense weights, or the configuration would change codes.
    """

    def __init__(self, weights: Name, config: PissaConfig) -> None:
        start, field = config.of_base(), "init" if config.repair is None else "repair"
        if not INIT_METHODS[start.init].repairs or config.quant_iters > 1 or config.error_feedback:
            raise ValueError(
                f"weights: got a checkpoint with {field}={start.init!r}, quant_iters={config.quant_iters}, "
                f"error_feedback={config.error_feedback}: bitsandbytes' codes stay as they are; allowed: "
                'repair="activations" with a calibration, or repair="loftq"'
            )
        try:
            self._checkpoint = Checkpoint.open(weights)
            self._checkpoint.require(Contents.DENSE)
        except ValueError as error:
            raise ValueError(f"weights: {error}") from error
        self.fingerprints: dict[str, str] = {}
        """The fingerprints of the weights that were read, by layer name."""
        self._read: list[str] = []

    def weight(self, name: str, base: Base) -> tuple[Tensor, ops.QuantizedWeight]:
        """Returns the weight [out, in] of the named layer, as bitsandbytes has quantised it, and its codes.

        Raises:
            ValueError: the checkpoint does not contain that weight, or contains a different one.
        """
        checkpoint = self._checkpoint
        checkpoint.release(self._read)  # otherwise the file's pages would count as this process's memory
        parameter = f"{name}.weight"
        if parameter not in checkpoint.tensors:  # a model without the head that config.json names
            parameter = f"{checkpoint.model.base_model_prefix}.{parameter}"
        try:
            parts = checkpoint.parts_of(parameter)
        except ValueError as error:
            raise ValueError(f"weights: {checkpoint.folder}: {error}") from error
        self._read = [part.tensor for part in parts]
        weight, codes = base.original(checkpoint.matrix(parts)), base.bnb_codes
        if weight is None or codes is None:
            raise ValueError(
                f"weights: {checkpoint.folder} has another weight in layer {name} than the one that bitsandbytes has "
                "quantised; give the checkpoint that the model was loaded from"
            )
        self.fingerprints[name] = fingerprint(weight)
        return weight, codes

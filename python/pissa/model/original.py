"""The dense weights of a model that bitsandbytes has quantised: what its codes lose of them is repaired."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pissa import ops
from pissa.base.bitsandbytes import BnbLinear4bit, is_bitsandbytes
from pissa.base.digest import Fingerprint, fingerprint
from pissa.base.init_methods import INIT_METHODS
from pissa.base.protocol import Base
from pissa.config import PissaConfig
from pissa.files.hub import Name, checkpoint_folder
from pissa.files.model_folder import Composition, matrix_of, meta_model, quantised_kind
from pissa.files.tensor_file import Source

_OTHER_CODES = 0.01
"""The share of bytes that may differ from those that our own kernels find: bitsandbytes divides by scales elsewhere. Of
weights that differ by 2 % of their norm 15 % differ."""


class OriginalWeights:
    """The checkpoint that a model was quantised from, mapped: one matrix at a time is read.

    Args:
        weights: its folder, or its name on the Hub.

    Raises:
        ValueError: it is no checkpoint of dense weights, or the configuration would change codes.
    """

    def __init__(self, weights: Name, config: PissaConfig) -> None:
        start = config.of_base()
        if not INIT_METHODS[start.init].takes_nothing or config.quant_iters > 1 or config.error_feedback:
            raise ValueError(
                f"weights: got a checkpoint with repair={start.init!r}, quant_iters={config.quant_iters}, "
                f"error_feedback={config.error_feedback}: bitsandbytes' codes stay as they are; allowed: "
                'repair="activations" with a calibration, or repair="loftq"'
            )
        folder = checkpoint_folder(weights)
        if kind := quantised_kind(folder):
            raise ValueError(f"weights: {folder} is quantised ({kind}); needed: the checkpoint in 16 or 32 bits")
        self.fingerprints: dict[str, Fingerprint] = {}
        """Of the weights that were read."""
        self._source, self._read = Source(folder), list[str]()
        self._parts = Composition(meta_model(folder), self._source.names)

    def weight(self, name: str, base: Base) -> tuple[Tensor, ops.QuantizedWeight]:
        """The weight [out, in] that bitsandbytes has quantised in the layer of that name, in the dtype in which it did,
        where the codes are; and the codes.

        Raises:
            ValueError: the checkpoint has no such weight, or another one.
        """
        assert isinstance(base, BnbLinear4bit)
        quantised = base.quantized
        self._source.release(self._read)  # or the file's pages would count as the process's memory
        parts = self._parts.matrix(f"{name}.weight", transposed=False)
        self._read = [part.tensor for part in parts]
        weight = matrix_of(parts, self._source)
        if tuple(weight.shape) == quantised.shape:
            weight = weight.to(base.device, base.decoded_dtype).contiguous()
            codes = ops.quantize(weight, quantised.format, blocksize=quantised.blocksize).codes
            if (codes != quantised.codes).float().mean() <= _OTHER_CODES:
                self.fingerprints[name] = fingerprint(weight)
                return weight, quantised
        raise ValueError(
            f"weights: {self._source.folder} has another weight in layer {name} than the one that bitsandbytes has "
            "quantised; give the checkpoint that the model was loaded from"
        )


def form_of(model: nn.Module) -> dict[str, Any]:
    """The fields of a configuration that say how bitsandbytes has quantised a model.

    Raises:
        ValueError: it has quantised no layer in 4 bits.
    """
    for module in model.modules():
        if is_bitsandbytes(module, "Linear4bit") and (state := getattr(module.weight, "quant_state", None)):
            options = {"blocksize": state.blocksize, "double_quant": state.nested}
            storage = str(module.weight.dtype).removeprefix("torch.")
            return {"quant": state.quant_type, **options, "quant_storage": storage}
    raise ValueError("weights: got a checkpoint, but bitsandbytes keeps no layer of the model in 4 bits")

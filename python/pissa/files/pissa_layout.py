"""The files of an adapter of ours, and the tensors of each layer in pissa.safetensors.

adapter_config.json         PEFT's, for a plain LoRA of rank 2r on the unmodified base
adapter_model.safetensors   PEFT's: lora_A = [A ; dA], lora_B = [dB | B0]
pissa.json                  the PissaConfig, and a fingerprint of each layer's base
pissa.safetensors           of each layer:
    a0                      B0, dA and dB are in PEFT's file
    base.a0, base.b0        the start factors of a stored base, if they are not the adapter's own
    base.taken_a, base.taken_b    the factors that its residual lacks, if alternations have found others than these
    norm                    with DoRA, the norms of the base's rows
    delta_a, delta_e        with AdaLoRA, the differences of singular vectors and values that dA is made of
    base.<part>             the residual of an output layer that is stored and saved
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from pissa.base.stored import Expected, residual_from, residual_shapes, residual_tensors
from pissa.config import PissaConfig
from pissa.files.peft_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from pissa.files.record import LayerRecord
from pissa.files.tensor_file import TensorFile
from pissa.layers.layer import PissaLayer
from pissa.ops import QuantizedWeight

PISSA_RECORD = "pissa.json"
PISSA_WEIGHTS = "pissa.safetensors"
CONFIG_FILES = (ADAPTER_CONFIG, PISSA_RECORD)
ADAPTER_FILES = (*CONFIG_FILES, ADAPTER_WEIGHTS, PISSA_WEIGHTS)


TAKEN = ("base.taken_a", "base.taken_b")


def start_tensors(
    name: str, layer: PissaLayer, adapter_name: str, config: PissaConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a layer, without its residual.

    Args:
        name: the layer's in the (unwrapped) model.
        state: the model's state dict, from which AdaLoRA's differences are taken.
    """
    start, kept = layer.start_of(adapter_name), layer.base.start
    parts = {"a0": start.a0}
    if kept is not None and kept is not start:
        parts |= {"base.a0": kept.a0, "base.b0": kept.b0}
    if kept is not None and kept.rank_taken:
        parts |= zip(TAKEN, kept.taken, strict=True)
    if config.use_adalora:
        deltas = layer.deltas_in(state, f"{PREFIX}{name}.", adapter_name)
        parts |= {"delta_a": deltas.a, "delta_e": cast(Tensor, deltas.e)}
    if config.use_dora:
        parts["norm"] = layer.magnitude(adapter_name).base_lengths
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def start_shapes(
    name: str, record: LayerRecord, matrix_shape: tuple[int, int], config: PissaConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of what `start_tensors` gives, all of it float32."""
    rows, columns = matrix_shape
    parts: dict[str, tuple[int, ...]] = {"a0": (record.r, columns)}
    if record.base is not None:
        parts |= {"base.a0": (record.base.r, columns), "base.b0": (rows, record.base.r)}
    if record.taken is not None:
        parts |= zip(TAKEN, ((record.taken, columns), (rows, record.taken)), strict=True)
    if config.use_adalora:
        parts |= {"delta_a": (record.r, columns), "delta_e": (record.r, 1)}
    if config.use_dora:
        parts["norm"] = (rows,)
    return {f"{name}.{part}": shape for part, shape in parts.items()}


def stored_tensors(name: str, residual: Tensor | QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a layer's residual."""
    return {f"{name}.base.{part}": tensor for part, tensor in residual_tensors(residual).items()}


def stored_shapes(
    name: str, record: LayerRecord, matrix_shape: tuple[int, int], file: TensorFile
) -> dict[str, Expected]:
    """The shapes and dtypes of what `stored_tensors` gives; none if the file has no residual of that layer."""
    shapes = {f"{name}.base.{part}": needed for part, needed in residual_shapes(record.form, matrix_shape).items()}
    return shapes if record.stored and shapes.keys() & set(file.names) else {}


def read_stored(
    name: str, record: LayerRecord, matrix_shape: tuple[int, int], file: TensorFile, device: torch.device
) -> Tensor | QuantizedWeight | None:
    """The residual of a layer, on a device; None if the file has none."""
    keys = stored_shapes(name, record, matrix_shape, file)
    if not keys:
        return None
    parts = {key.rpartition(".")[2]: file.read(key).to(device) for key in keys}
    return residual_from(parts, record.form, matrix_shape)

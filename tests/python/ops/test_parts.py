"""A quantised weight whose parts do not fit together is refused by name, whatever its format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.compare.gguf_blocks import random_blocks, weight_of
from devices import fetch, put
from pissa import ops

NESTED = {"nested_absmax": torch.zeros(1), "offset": torch.tensor(0.0), "absmax": torch.zeros(4, dtype=torch.uint8)}
INCONSISTENT = [
    ("nf4", {"codes": torch.zeros(7, dtype=torch.uint8)}, "weight.codes: got 7 elements; needed: 8"),
    ("nf4", {"codes": torch.zeros(8)}, "weight.codes: got dtype float32; allowed: uint8"),
    ("nf4", {"absmax": torch.zeros(2)}, "weight.absmax: got 2 elements; needed: 1"),
    (
        "nf4",
        {"absmax": torch.zeros(1, dtype=torch.uint8)},
        "weight: nested scales need absmax uint8",
    ),
    ("nf4", {"nested_absmax": torch.zeros(1)}, "weight: nested scales need absmax uint8"),
    ("nf4", {"shape": (4, 5)}, "weight.codes: got 8 elements; needed: 10"),
    ("nf4", {"blocksize": 5}, "blocksize"),
    ("int8", {"codes": torch.zeros(19, dtype=torch.uint8)}, "weight.codes: got 19 elements; needed: 20"),
    ("int8", {"codes": torch.zeros(20, dtype=torch.int8)}, "weight.codes: got dtype int8; allowed: uint8"),
    ("int8", {"absmax": torch.zeros(5)}, "weight.absmax: got"),
    ("int8", {"blocksize": 64}, "weight.blocksize: got"),
    ("int8", {"shape": (5, 4)}, "weight.blocksize: got"),
    ("int8", NESTED, "weight.nested_absmax: got"),
    ("mxfp4", {"absmax": torch.ones(32)}, "weight.absmax: got torch.float32; needed for mxfp4: torch.uint8"),
    ("mxfp4", {"blocksize": 64}, "blocksize: got 64; allowed: 32"),
    ("nvfp4", {"nested_absmax": None}, "weight.nested_absmax: got"),
    ("int4", {"nested_absmax": torch.ones(256)}, "weight.nested_absmax: got"),
    ("int4", {"shape": (1, 1000)}, "int4: got a weight of 1000 columns; needed: a multiple of 64"),
    ("fp8", {"absmax": torch.ones(9)}, "weight.absmax: got 9 elements; needed: 8 or 1"),
    ("fp8", {"blocksize": 0}, "weight.blocksize: got 0; allowed: from 1 on"),
    ("fp8", {"nested_absmax": torch.ones(256)}, "weight.nested_absmax: got"),
    ("q4_k", {"absmax": torch.ones(8, dtype=torch.uint8)}, "weight.absmax: got 8 elements; needed: 0"),
    ("q4_k", {"absmax": torch.ones(0)}, "weight.absmax: got torch.float32; needed for q4_k: torch.uint8"),
    ("q4_k", {"blocksize": 32}, "blocksize: got 32; allowed: 256"),
    ("q4_k", {"shape": (3, 256)}, "weight.codes: got 288 elements; needed: 432"),
    ("q4_k", {"shape": (2, 128)}, "q4_k: got a weight of 128 columns; needed: a multiple of 256"),
    ("q4_k", {"nested_absmax": torch.ones(256)}, "weight.nested_absmax: got"),
]
SHAPES, OPTIONS = {"nf4": (4, 4), "int8": (4, 5)}, {"nf4": {"double_quant": False}}


@pytest.mark.parametrize(("format", "change", "message"), INCONSISTENT)
def test_inconsistent_parts_are_refused(format: str, change: dict[str, Any], message: str) -> None:
    if format == "q4_k":
        weight = weight_of(random_blocks(format, 2, 256), format)
    else:
        dense = torch.ones(SHAPES.get(format, (8, 128)))
        weight = fetch(ops.quantize(put(dense), format, **OPTIONS.get(format, {})))
    wrong, rows = put(weight._replace(**change)), put(torch.ones(2, weight.shape[1]))
    expected = TypeError if "codes: got dtype" in message else ValueError
    for read in (lambda: ops.dequantize(wrong), lambda: ops.linear(rows, wrong)):
        with pytest.raises(expected, match=f"^{message}"):
            read()

"""bitsandbytes' quant_state, in the state dict of a layer."""

from __future__ import annotations

from pathlib import Path

import torch

from pissa.base.bitsandbytes import linear4bit
from pissa.base.bitsandbytes_state import to_bitsandbytes
from pissa.ops import quantize

FILE, NAMED = "state.json", "weight"
STATE = "weight.quant_state.bitsandbytes__nf4"

ENTRIES = [to_bitsandbytes(quantize(torch.ones(8, 64), double_quant=nested), torch.float32) for nested in (True, False)]


def parse(folder: Path) -> None:
    content = bytearray((folder / FILE).read_bytes())
    state = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    refused = 0
    for entries in ENTRIES:
        try:
            linear4bit(entries | {STATE: state}, None, None)
        except ValueError as error:
            refused += 1
            if refused == len(ENTRIES):
                raise error

"""The bar of a run over a checkpoint."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def bar_of_bytes(name: str, total: int, done: int) -> Any:
    """tqdm's bar over so many bytes, of which some have been done before."""
    # tqdm reads TQDM_DISABLE only if it is not told whether to be disabled.
    return tqdm(total=total, initial=done, desc=f"PiSSA {name}", unit="B", unit_scale=True, unit_divisor=1000)

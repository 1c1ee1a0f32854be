"""Settings of torch for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def _setting(get: Callable[[], Any], set: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    set(value)
    try:
        yield
    finally:
        set(before)


threads = partial(_setting, torch.get_num_threads, torch.set_num_threads)
default_dtype = partial(_setting, torch.get_default_dtype, torch.set_default_dtype)

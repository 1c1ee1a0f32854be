"""The requirements of `make test-oldest`."""

from __future__ import annotations

import re
import sys

import pytest

if sys.version_info < (3, 11):
    pytest.skip("Python 3.10 cannot read TOML", allow_module_level=True)
import oldest


def test_everything_has_a_floor_and_is_held_at_it() -> None:
    pins = oldest.oldest("test", [])
    assert [pin for pin in pins if not re.fullmatch(r"[\w-]+(\[[\w-]+\])?==[\d.]+", pin)] == []
    assert {pin.replace("==", ">=") for pin in pins} >= {*oldest.PROJECT["dependencies"]}


def test_what_is_named_stays_at_its_newest() -> None:
    pins, others = (oldest.oldest("test", newest) for newest in ([], ["torch"]))
    [(pin, floor)] = [pair for pair in zip(pins, others, strict=True) if pair[0] != pair[1]]
    assert pin.startswith("torch==")
    assert floor == pin.replace("==", ">=")

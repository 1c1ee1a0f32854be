"""The requirements that the Makefile's environments are made of."""

from __future__ import annotations

import re

import requirements


def test_everything_has_a_floor_and_is_held_at_it() -> None:
    pins = requirements.oldest("test", [])
    assert [pin for pin in pins if not re.fullmatch(r"[\w-]+(\[[\w-]+\])?==[\d.]+", pin)] == []
    assert [pin.replace("==", ">=") for pin in pins] == requirements.newest("test")
    assert {*requirements.PROJECT["dependencies"]} <= {*requirements.newest("test")}


def test_what_is_named_stays_at_its_newest() -> None:
    pins, others = (requirements.oldest("test", but) for but in ([], ["torch"]))
    [(pin, floor)] = [pair for pair in zip(pins, others, strict=True) if pair[0] != pair[1]]
    assert pin.startswith("torch==")
    assert floor == pin.replace("==", ">=")

"""The API reference: what is public is on the page, with the defaults that it has. Sphinx itself sees to it that each
name there exists."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from peft import LoraConfig

import pissa

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/api/python.md").read_text()
DESCRIBED = set(re.findall(r"^ *\.\. (?:auto|py:)\w+:: ([\w.]+)", PAGE, re.MULTILINE))


@pytest.mark.parametrize("module", [pissa, pissa.ops, pissa.layers], ids=lambda module: module.__name__)
def test_every_public_name_is_on_the_page(module: object) -> None:
    assert {f"{module.__name__}.{name}" for name in module.__all__} - DESCRIBED == set()


def test_the_configuration_has_its_fields_and_defaults() -> None:
    """They are written out, for autodoc would put LoraConfig's fields before them."""
    signature = re.search(r"autoclass:: pissa\.(PissaConfig\(.*\))", PAGE)
    assert signature
    call = ast.parse(f"def {signature[1]}: pass").body[0]
    assert isinstance(call, ast.FunctionDef)
    written = {
        arg.arg: ast.literal_eval(default)
        for arg, default in zip(call.args.kwonlyargs, call.args.kw_defaults, strict=True)
        if default is not None
    }
    inherited = {field.name for field in dataclasses.fields(LoraConfig)}
    own = {field.name: field.default for field in dataclasses.fields(pissa.PissaConfig) if field.name not in inherited}
    assert written == own

"""What SECURITY.md promises of files: nothing in the package runs code that a file holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "python/pissa"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "yaml.load", "os.system"}
KEYWORDS = {"shell=True", "allow_pickle=True", "weights_only=False"}


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {str(node.module)} & MODULES
        elif isinstance(node, ast.Call):
            yield from {ast.unparse(node.func)} & CALLS
            yield from {f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords} & KEYWORDS


def test_nothing_runs_what_a_file_holds() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 100
    found = {path.relative_to(PACKAGE).as_posix(): list(dangers(path.read_text())) for path in sources}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "eval(text)",
        "yaml.load(text)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_each_is_found(source: str) -> None:
    assert list(dangers(source))

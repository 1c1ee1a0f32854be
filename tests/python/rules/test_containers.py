"""What a folder contains is asked in one place: of a model in `checkpoint.py`, of an adapter in `lora_folder.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "python" / "pissa"

QUESTIONS = {"is_file", "isfile", "exists", "lexists"}
FILES = {"PISSA_RECORD", "INITIAL_FOLDER", "CONFIG", "INDEX"}
FIELDS = {"quant_method", "quantization_config", "pissa_init"}

ALLOWED = {
    "containers/checkpoint.py": FILES | FIELDS,
    "containers/recognise.py": {"CONFIG"},  # whether it may be one, before anything is imported to open it
    "adapters/lora_folder.py": FILES,
    "adapters/pissa_layout.py": {"PISSA_RECORD"},  # below lora_folder.py: it reads the file, or says that there is none
    "containers/hub.py": {"INDEX"},  # the file with the names of those to download
    "containers/tensor_file.py": {"INDEX"},
    "base/bitsandbytes_state.py": {"quant_method"},  # written
    "checkpoints/rewrite.py": {"quantization_config"},  # written
    "checkpoints/load.py": {"quantization_config"},  # hidden from transformers
}


def asked(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a source that ask what a folder is, and the name of the file or field that they look for."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in FIELDS:
            yield node.lineno, str(node.value)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
            yield from ((node.lineno, name) for name in sorted(FILES & names) if called in QUESTIONS)


def test_one_module_asks_what_a_folder_is() -> None:
    elsewhere = [
        f"{name}:{line}: {what}"
        for name, path in {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}.items()
        for line, what in asked(path.read_text())
        if what not in ALLOWED.get(name, ())
    ]
    assert not elsewhere, f"ask ModelFolder.open(name).contents, or open_adapter(folder), instead of: {elsewhere}"


@pytest.mark.parametrize(
    ("question", "what"),
    [
        ("(folder / PISSA_RECORD).is_file()", "PISSA_RECORD"),
        ('os.path.isfile(folder / f"{INITIAL_FOLDER}/x.json")', "INITIAL_FOLDER"),
        ('config["quant_method"] == "fp8"', "quant_method"),
    ],
)
def test_a_question_is_seen(question: str, what: str) -> None:
    assert [*asked(question)] == [(1, what)]
    assert not [*asked("(folder / NAME).is_file() and PISSA_RECORD")]

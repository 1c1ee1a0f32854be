"""The rooms of python/pissa: every module is in one, and stands on modules below it only."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "python" / "pissa"
CORE = "pissa._C"

PEFT = {"torch", "peft", "transformers", "accelerate"}

# The rooms from the lowest up, the ground floor's modules one by one: a module may import from its own room and from
# those before it. Beside each room, the libraries that it may use.
ROOMS: dict[str, set[str]] = {
    "notices": set(),
    "system": set(),
    "ops": {"torch"},
    "distributed": {"torch"},
    "peft_private": PEFT,
    "config": {"torch", "peft"},
    "base": PEFT | {"xxhash"},
    "layers": PEFT,
    "containers": PEFT | {"safetensors"},
    "adapters": PEFT | {"safetensors"},
    "model": PEFT | {"tqdm"},
    "training": PEFT | {"tqdm"},
    "conversion": PEFT | {"tqdm"},
    "checkpoints": PEFT | {"safetensors", "tqdm"},
    "integrations": PEFT | {"safetensors", "tqdm"},
    "cli": PEFT | {"tqdm", "safetensors", "datasets", "trl", "yaml", "psutil"},
}
# Libraries that one module alone uses.
ALONE = {
    "base/bitsandbytes.py": {"bitsandbytes"},
    "cli/completion.py": {"shtab"},
    "distributed.py": {"deepspeed"},
    "containers/hub.py": {"huggingface_hub"},
    "containers/gguf_model.py": {"gguf"},
    "containers/gguf_tokenizer.py": {"tokenizers"},
    "integrations/dense_gguf.py": {"gguf"},
    "integrations/gguf.py": {"gguf"},
    "integrations/llama_cpp.py": {"llama_cpp"},
}
# Modules of no room: the package's face, and what starts the command line.
FACE = {"pissa", "pissa.__main__"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    """The full names of all that a file imports, wherever in it: in functions and for type hints too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} is a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name in MODULES or name == CORE}
            found |= modules | ({str(node.module)} if names - modules else set())
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in MODULES.keys() - FACE} == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stands_on_those_below_it(room: str) -> None:
    order = list(ROOMS)
    below = {*order[: order.index(room) + 1]}
    allowed = sys.stdlib_module_names | ROOMS[room]
    for module in (module for module in MODULES.keys() - FACE if room_of(module) == room):
        alone = ALONE.get(MODULES[module].relative_to(PACKAGE).as_posix(), set())
        for imported in IMPORTS[module]:
            if imported == CORE:
                assert room == "ops", f"{module} talks to the compiled core; only ops may"
            elif imported.startswith("pissa."):
                assert room_of(imported) in below, f"{module} imports {imported}, which is above it"
            elif imported == "pissa":
                assert room == "cli", f"{module} imports the package's face, which is above it"
            else:
                assert imported.split(".")[0] in allowed | alone, f"{module} imports {imported}"
        if room != "ops":
            assert "torch.ops.pissa" not in MODULES[module].read_text(), f"{module} calls the compiled ops"


def test_no_circle() -> None:
    graph = {module: imported & MODULES.keys() for module, imported in IMPORTS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")

"""How large python/pissa may be. `make size` prints the lines of each room.

Docstrings, comments and blank lines are not counted, nor are tests, benchmarks and C++: neither a regression test nor a
sentence that explains something may turn the tests red."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "python" / "pissa"

LIMIT = 13_927
"""Lines of code with the ops in PyTorch's operations, 303 with their checks, for which `pissa report` went, 116. (Those
in C++ are not counted.) There is no air: what comes next begins with what goes. Is there a second way to do
something?"""

_NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path: Path) -> int:
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {line for token in tokens if token.type not in _NOT_CODE for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def rooms() -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else "."
        sizes[room] = sizes.get(room, 0) + lines_of_code(path)
    return dict(sorted(sizes.items()))


def test_the_package_is_not_above_its_limit() -> None:
    assert sum(rooms().values()) <= LIMIT


if __name__ == "__main__":
    for room, size in rooms().items():
        print(f"{room:14}{size:6}")
    print(f"{'all':14}{sum(rooms().values()):6}  of {LIMIT}")

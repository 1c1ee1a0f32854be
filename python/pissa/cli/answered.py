"""A table with one more column, otherwise as it was: a file of records whose rows have been answered."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pissa.cli.sources import separator_of
from pissa.cli.terminal import UserError

_BOM = "\ufeff"


def write_answered(source: Path, target: Path, column: str, answers: Sequence[str]) -> None:
    """Writes a file of records again, with the answers as its last column. A row of a CSV file or of JSON lines is
    followed by its answer, and no character of it changes.

    Args:
        source: of a kind in `WRITERS`, read by `pissa.cli.sources.records` before.
        answers: as many as the records.
    """
    WRITERS[source.suffix.lower()](source, target, column, answers)


def check_kind(source: str) -> None:
    """Refuses a file that has no rows to which an answer could be added."""
    if Path(source).suffix.lower() not in WRITERS:
        raise UserError(
            f"{source}: has no rows for answers; allowed: {', '.join(WRITERS)}; pissa chat RUN < FILE answers one text"
        )


def _texts(source: Path) -> Iterator[str]:
    """The text of a file, after its byte order mark, if it has one."""
    text = source.read_bytes().decode()
    yield _BOM if text.startswith(_BOM) else ""
    yield text.removeprefix(_BOM)


def _put(target: Path, text: str) -> None:
    target.write_bytes(text.encode())


def _table(source: Path, target: Path, column: str, answers: Sequence[str]) -> None:
    mark, content = _texts(source)
    separator = separator_of(source, content)
    lines = list(io.StringIO(content, newline=""))
    reader, done, rows = csv.reader(lines, delimiter=separator, strict=True), 0, []
    quoting: Any = csv.QUOTE_ALL if content.startswith('"') else csv.QUOTE_MINIMAL
    cells = iter((column, *answers))
    for row in reader:
        text, done = "".join(lines[done : reader.line_num]), reader.line_num
        if row:
            cell = io.StringIO(newline="")
            csv.writer(cell, delimiter=separator, quoting=quoting, lineterminator="\r\n").writerow(["", next(cells)])
            begun = text.rstrip("\r\n")
            text = begun + cell.getvalue().removeprefix('""').removesuffix("\r\n") + text[len(begun) :]
        rows.append(text)
    _put(target, mark + "".join(rows))


def _json_lines(source: Path, target: Path, column: str, answers: Sequence[str]) -> None:
    mark, content = _texts(source)
    following = iter(answers)

    def with_answer(line: str) -> str:
        begun, closed, end = line.rpartition("}")
        if not closed:  # an empty line
            return line
        comma = "" if re.fullmatch(r"\s*\{\s*", begun) else ", "
        return f"{begun}{comma}{_pair(column, next(following))}{closed}{end}"

    _put(target, mark + "\n".join(map(with_answer, content.split("\n"))))


def _pair(column: str, answer: str) -> str:
    return ": ".join(json.dumps(text, ensure_ascii=False) for text in (column, answer))


def _json(source: Path, target: Path, column: str, answers: Sequence[str]) -> None:
    mark, content = _texts(source)
    rows = [{**record, column: answer} for record, answer in zip(json.loads(content), answers, strict=True)]
    _put(target, f"{mark}{json.dumps(rows, indent=2, ensure_ascii=False)}\n")


def _parquet(source: Path, target: Path, column: str, answers: Sequence[str]) -> None:
    import datasets

    datasets.Dataset.from_parquet(str(source)).add_column(column, list(answers)).to_parquet(str(target))


WRITERS: dict[str, Callable[[Path, Path, str, Sequence[str]], None]] = {
    ".csv": _table,
    ".tsv": _table,
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
"""How each kind of file is written."""

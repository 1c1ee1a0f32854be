"""Where records of training data come from: files, folders of texts, data sets. Each record is given with its place,
for error messages."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pissa.cli.terminal import UserError, user_errors
from pissa.containers.messages import quote

ALLOWED = "allowed: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a folder of .txt files"

Records = Iterator[tuple[str, Any]]


def is_records(source: str) -> bool:
    """Whether `source` is a file, a folder of texts, or looks like a path. Otherwise it is a data set."""
    path = Path(source)
    if path.is_dir():
        return bool(_texts(path))
    has_extension = re.fullmatch(r"\.[a-z]{2,7}", path.suffix.lower())  # names on the Hub may end in .1
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or bool(path.drive)
    return path.is_file() or bool(has_extension) or looks_like_path


def records(source: str, columns: Mapping[str, str] | None = None, rows: Iterable[Any] | None = None) -> Records:
    """Yields the records of a file, of a folder of texts, or of the data set with these rows.

    Args:
        columns: for each name that a record is to have, the column that it is read from. None: all, as they are named.
    """
    found = _read(source) if rows is None else _numbered(source, rows)
    is_empty = True
    for where, record in found:
        is_empty = False
        if columns and isinstance(record, dict):
            if missing := [column for column in columns.values() if column not in record]:
                names = ", ".join(map(quote, record))
                raise UserError(f"{where}: --columns names {quote(missing[0])}; allowed: {names} [P104]")
            record = {name: record[column] for name, column in columns.items()}
        yield where, record
    if is_empty:
        raise UserError(f"{source}: is empty; needed: at least one record [P101]")


def _read(source: str) -> Records:
    check_source(source)
    path = Path(source)
    if path.is_dir():
        for text in _texts(path):
            yield from _text(text)
    else:
        yield from _KINDS[path.suffix.lower()](path)


def check_source(source: str) -> None:
    """Checks that there is a file, or a folder of texts, of a kind that is read."""
    path = Path(source)
    if path.is_dir():
        if not _texts(path):
            raise UserError(f"{source}: is a folder with other files than texts; {ALLOWED} [P101]")
    elif not path.is_file():
        raise UserError(f"{source}: no such file{did_you_mean(path)}; {ALLOWED} [P101]")
    elif path.suffix.lower() not in _KINDS:
        raise UserError(f"{source}: is of an unknown kind; {ALLOWED} [P101]")


def did_you_mean(path: Path) -> str:
    """The part of a message on a missing file or folder that names those beside it with a name like it, if any."""
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    near = " or ".join(str(path.parent / name) for name in get_close_matches(path.name, names))
    return near and f"; did you mean {near}?"


def _texts(folder: Path) -> list[Path]:
    """The files of a folder, if all are texts."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return files if all(path.suffix.lower() == ".txt" for path in files) else []


def _content(path: Path) -> str:
    with user_errors(OSError, before=f"{path}: cannot be read: "):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line} has a letter in another encoding (byte {content[error.start]:#x}); allowed: UTF-8; "
            'in a spreadsheet, save the table as "CSV UTF-8" [P102]'
        ) from None
    if not text.strip():
        raise UserError(f"{path}: is empty; needed: at least one record [P101]")
    return text


def _text(path: Path) -> Records:
    yield str(path), {"text": _content(path)}


def _json(path: Path) -> Records:
    value = _value(str(path), _content(path))
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: found {quote(value)}; needed in a .json file: a list of records [P101]")
    yield from ((f"{path}: record {number}", record) for number, record in enumerate(value, 1))


def _json_lines(path: Path) -> Records:
    # Not splitlines(): a JSON string may contain U+2028, where splitlines() would end the line.
    for number, line in enumerate(_content(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _value(f"{path}:{number}", line)


def _value(where: str, text: str) -> Any:
    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_different(where, [name for name, _ in pairs])
        return dict(pairs)

    needed = f"; found {quote(text.strip())}; needed: records in JSON"
    with user_errors(ValueError, RecursionError, before=f"{where}: not JSON: ", after=needed):
        return json.loads(text, object_pairs_hook=as_dict)


def _check_different(where: str, names: Sequence[str]) -> None:
    """Refuses a record in which a name occurs twice, because only one of its values could be read."""
    if len(names) > len({*names}):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: {quote(twice)} occurs twice; needed: a name once in a record; rename or remove one")


def _table(path: Path) -> Records:
    """Rows of texts. In a .csv, spreadsheets write semicolons where the comma separates decimals."""
    content = _content(path)
    separator = separator_of(path, content)
    needed = f"; needed: cells between {separator!r}, in double quotes those with {separator!r} or a line break [P102]"
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    with user_errors(csv.Error, before=f"{path}: not a table: ", after=needed):
        names = [name.strip() for name in next(reader)]
        _check_different(f"{path}:1", [name for name in names if name])  # spreadsheets write columns without any
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if cells and len(cells) != len(names):
                raise UserError(f"{where}: found {len(cells)} cells; the first line has {len(names)}{needed}")
            if cells:
                yield where, dict(zip(names, cells, strict=True))


def separator_of(path: Path, content: str) -> str:
    """What is between the cells of a table, as its first line shows."""
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=content.partition("\n")[0].count)


def _parquet(path: Path) -> Records:
    import datasets

    errors = (OSError, ValueError, datasets.exceptions.DatasetsError)
    with user_errors(*errors, before=f"{path}: cannot be read: ", after="; allowed: a table in Parquet [P102]"):
        rows = datasets.Dataset.from_parquet(str(path))
    yield from _numbered(str(path), rows)


def _numbered(source: str, rows: Iterable[Any]) -> Records:
    return ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))


_KINDS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text,
    ".csv": _table,
    ".tsv": _table,
}

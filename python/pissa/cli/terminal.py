"""Input and output of commands: numbers within limits, lines and tables on stdout, errors that the user can correct,
and other packages kept silent."""

from __future__ import annotations

import argparse
import io
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from pissa.containers.messages import first_line

_WIDTH = 100
"""The most columns of a line of a text that is shown."""


class UserError(Exception):
    """An error that the user can correct. The message says what is wrong, what is allowed and how to fix it. Any
    command may raise it, before anything is overwritten."""


@contextmanager
def user_errors(*errors: type[Exception], before: str = "", after: str = "") -> Iterator[None]:
    """Turns errors of these classes in the block into a UserError: the first line of their text, between two others."""
    try:
        yield
    except errors as error:
        raise UserError(f"{before}{first_line(error)}{after}") from error


class Parser(argparse.ArgumentParser):
    """A parser, also of commands, whose errors are UserErrors: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def print_row(label: str, text: str) -> None:
    """Prints one line: a label and the text. Progress bars and errors go to stderr instead."""
    print(f"{label:<9} {text}", flush=True)


@contextmanager
def busy_with(what: str) -> Iterator[None]:
    """In the block, which prints nothing itself, the last line of a terminal says what takes a while. By no package:
    `pissa env` and `pissa selftest` run where only torch and numpy are installed."""
    is_seen = sys.stderr is not None and sys.stderr.isatty()
    line = f"{'':<9} {what} ..."
    screen = sys.stderr if is_seen else io.StringIO()
    print(line, end="\r", file=screen, flush=True)
    try:
        yield
    finally:
        print(" " * len(line), end="\r", file=screen, flush=True)


def has_terminal() -> bool:
    """Whether someone can answer on stdin, which Python lacks if it was closed before the start."""
    return sys.stdin is not None and sys.stdin.isatty()


@contextmanager
def collect_notes(prints: bool) -> Iterator[list[str]]:
    """Collects the warnings of the block, and prints each at once, because it may call hours of work into question."""
    texts: list[str] = []

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if (text := str(message)) not in texts:
            texts.append(text)
            if prints:
                print_row("note", text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = note
        yield texts


@contextmanager
def first_interrupt(act: Callable[[], None], *signals: signal.Signals) -> Iterator[None]:
    """In the block, the first Ctrl-C, or the first of these signals, calls `act`, and a second one ends the command."""
    signals = signals or (signal.SIGINT,)

    def handle(*_: object) -> None:
        for each in signals:
            signal.signal(each, signal.default_int_handler)
        act()

    with handled(handle, *signals):
        yield


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any], *signals: signal.Signals) -> Iterator[None]:
    """In the block, these signals call the handler."""
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, own in before.items():
            signal.signal(each, own)


def as_rows(label: str, text: str, lines: int) -> str:
    """A label and a text of at most so many lines of 100 columns, without what is in the middle of longer ones."""
    whole = text.removesuffix("\n").split("\n")
    part = [line if len(line) <= _WIDTH else f"{line[:69]}…{line[-30:]}" for line in whole]
    if (more := len(part) - lines) > 0:  # the last lines of a prompt are next to the answer
        part[1 : more + 2] = ["…"]
    return "\n".join([f"{label:<9} {part[0]}", *(f"{'':<9} {line}".rstrip() for line in part[1:])])


def as_size(count: int) -> str:
    """A number of bytes with three digits, such as "1.23 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def count_of(number: int, what: str) -> str:
    """A number of things: "1 step", "2,000 steps"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def as_duration(seconds: float) -> str:
    """A duration with about two digits: "40 s", "9 minutes", "1.7 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.2g} hours"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table with aligned columns. The first column is aligned to the left. The others contain numbers and are
    aligned to the right.

    Args:
        header: one cell for each column. A cell may have several lines.
        rows: each has one cell for each column.
    """
    heads = [cell.split("\n") for cell in header]
    depth = max(map(len, heads))
    heads = [[""] * (depth - len(head)) + head for head in heads]
    lines = [[head[i] for head in heads] for i in range(depth)] + [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(depth, ["-" * width for width in widths])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def silence_third_parties() -> None:
    """Silences messages of other packages that would clutter the screen. Call it before importing peft and
    transformers."""
    # peft asks transformers for an attribute that transformers has renamed. Nothing can be done about it here.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # TRL's own defaults use a name that transformers has since changed.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    # peft imports bitsandbytes if it is installed, which reports an optional kernel package at every start.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The Trainer reports which special tokens of the model it sets to those of the tokenizer.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    # These bars appear for a tenth of a second ("Loading weights", "Writing model shards") between our own lines.
    transformers_logging.disable_progress_bar()


def number(convert: Callable[[str], Any], allowed: str, valid: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A `type` for argparse: `convert` reads the text, `valid` checks the value, `allowed` completes the error."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
        return value

    return parse


count = number(int, "a whole number of at least 0", lambda value: value >= 0)
positive_int = number(int, "a whole number above 0", lambda value: value > 0)
minutes_of = number(float, "a number of minutes, 1 or more", lambda minutes: 1 <= minutes < float("inf"))


def _columns(text: str) -> dict[str, str]:
    pairs = [[side.strip() for side in part.split("=")] for part in text.split(",")]
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


columns = number(
    _columns,
    "NAME=COLUMN, separated by commas, each NAME once, such as question=frage,answer=antwort",
    lambda value: all(value) and all(value.values()),
)
THREADS_HELP = "threads that compute (default: as many as other programs leave cores free)"
COLUMNS_HELP = "columns to use under other names, such as question=frage,answer=antwort"

"""`pissa predict`: a trained model answers every row of a table. An interrupted command goes on where it was."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pissa.cli.answered import check_kind, write_answered
from pissa.cli.data import read_prompts
from pissa.cli.journal import Answer, Journal
from pissa.cli.score import RIGHT, is_right, most_frequent
from pissa.cli.sources import check_source, records
from pissa.cli.templates import Chat, check_template
from pissa.cli.terminal import (
    COLUMNS_HELP,
    THREADS_HELP,
    UserError,
    collect_notes,
    columns,
    count_of,
    positive_int,
    print_row,
    silence_third_parties,
    user_errors,
)
from pissa.containers.messages import quote
from pissa.containers.staged import staged

_COLUMNS = ("answer", "predicted")
_PIPE = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = "folder of a run, an adapter or a model, a GGUF file, or its name on the Hugging Face Hub"
    add("source", metavar="RUN", help=source)
    data = "file with a question in each row (.jsonl, .json, .csv, .tsv, .parquet); -: CSV or JSON from a pipe"
    add("--data", required=True, metavar="FILE", help=data)
    add("--out", required=True, metavar="FILE", help="new file of the same kind, with a column more; -: to stdout")
    add("--columns", type=columns, metavar="NAME=COLUMN,...", help=COLUMNS_HELP.partition(",answer")[0])
    add("--expected", metavar="COLUMN", help="column with the right answers: count how many are given")
    add("--column", metavar="NAME", help=f"the new column (default: {_COLUMNS[0]}, or {_COLUMNS[1]} beside one)")
    add("--system", metavar="TEXT", help="system prompt of each question that has none of its own")
    add("--max-tokens", type=positive_int, default=512, metavar="N", help="longest answer, in tokens")
    add("--base", metavar="DIR_OR_NAME", help="model of the adapter (default: the one that the adapter names)")
    add("--config-from", metavar="DIR_OR_NAME", help="model whose config.json and tokenizer are used for a GGUF file")
    add("--threads", type=positive_int, metavar="N", help=THREADS_HELP)
    code = "run the code that comes with the model or its tokenizer, also where the training was given this option"
    add("--trust-remote-code", action="store_true", help=code)


class Asked(NamedTuple):
    """What a table asks."""

    chats: list[Chat]
    """One for each row; without messages where its question is empty."""
    expected: list[str] | None
    column: str
    """The name of the new column."""


def run(args: argparse.Namespace) -> int:
    """Answers the rows that have no answer yet, and writes the table when all have one. Returns the exit code."""
    with _source(args.data) as data:
        asked = _read(args, data)
        if args.out == _PIPE:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder, f"answers{data.suffix}")
                with contextlib.redirect_stdout(sys.stderr):
                    _predict(args, data, target, asked)
                sys.stdout.buffer.write(target.read_bytes())
        else:
            _predict(args, data, Path(args.out), asked)
    return 0


@contextlib.contextmanager
def _source(data: str) -> Iterator[Path]:
    """The file of the data, which may come through a pipe."""
    if data != _PIPE:
        yield Path(data)
        return
    content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    kind = {b"{": ".jsonl", b"[": ".json"}.get(content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1], ".csv")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"stdin{kind}")
        path.write_bytes(content)
        yield path


def _read(args: argparse.Namespace, data: Path) -> Asked:
    """Reads and checks everything but the model, in a moment."""
    check_source(str(data))
    check_kind(str(data))
    if args.out != _PIPE:
        kind = Path(args.out).suffix.lower()
        if kind != data.suffix.lower():
            raise UserError(f"--out {args.out}: ends in {quote(kind)}; allowed: the data's kind, {data.suffix}")
        if os.path.lexists(args.out):
            raise UserError(f"--out {args.out}: exists, and nothing is overwritten; choose another [P065]")
        if not Path(args.out).parent.is_dir():
            raise UserError(f"--out {args.out}: there is no folder {Path(args.out).parent}; make it first")
    rows = [*records(str(data))]
    names = {str(name): None for _, row in rows if isinstance(row, dict) for name in row}
    column = args.column or next((name for name in _COLUMNS if name not in names), None)
    if column is None or column in names:
        given = f"--column {column}: is" if column else f"{' and '.join(map(quote, _COLUMNS))} are"
        raise UserError(f"{given} in {data} already; name a new column: --column NAME")
    if args.expected is not None and args.expected not in names:
        raise UserError(f"--expected {args.expected}: {data} has the columns {', '.join(map(quote, names))}; give one")
    expected = None if args.expected is None else [_as_text(row.get(args.expected)) for _, row in rows]
    return Asked(read_prompts(records(str(data), args.columns)), expected, column)


def _as_text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _predict(args: argparse.Namespace, data: Path, target: Path, asked: Asked) -> None:
    """Answers what is not answered yet, writes `target`, and says how it went."""
    journal, nothing = Journal(target, _dependencies(args, data, asked)), Answer("", "no question")
    left = [row for row, chat in enumerate(asked.chats) if chat.messages and row not in journal.answers]
    seconds = 0.0
    try:
        if left:
            seconds = _answer(args, asked.chats, left, journal)
        answers = [journal.answers.get(row, nothing) for row in range(len(asked.chats))]
        with user_errors(OSError, before=f"{target}: cannot be written: "), staged(target.parent) as path:
            write_answered(data, path(target.name), asked.column, [answer.text for answer in answers])
    except KeyboardInterrupt:
        done = f"{len(journal.answers)} of {count_of(len(asked.chats), 'row')} done"
        kept = "nothing is kept" if args.out == _PIPE else f"the same command goes on from {journal.path}"
        raise KeyboardInterrupt(f"{done}; {kept}") from None
    journal.remove()
    said = [count_of(len(answers), "row") + (f", {seconds / len(left):.2g} s each" if left else "")]
    if asked.expected is not None:
        rows = zip(answers, asked.expected, strict=True)
        pairs = [(answer.text, right) for answer, right in rows if right and answer is not nothing]
        found = f"{sum(is_right(*pair) for pair in pairs)} of {len(pairs)}"
        if pairs:
            usual, count = most_frequent([right for _, right in pairs])
            found += f"; always {usual!r} would be right for {count}"
        print_row("right", found)
        print_row("", f"right: {RIGHT}")
    for ended_by, number in Counter(answer.ended_by for answer in answers).items():
        if ended_by:
            print_row("note", f"{count_of(number, 'row')}: {_ENDED[ended_by]}")
    print_row("done", "; ".join([*said, *([] if args.out == _PIPE else [f"saved {target}"])]))


_ENDED = {
    "no question": "the question is empty, and so is the answer",
    "length": "the answer was cut after --max-tokens, or where the model's context is full",
    "repeats": "the answer was stopped, because it repeated itself",
}


def _dependencies(args: argparse.Namespace, data: Path, asked: Asked) -> dict[str, Any]:
    """What the answers depend on."""
    source = Path(args.source)
    files = sorted(source.iterdir() if source.is_dir() else [source] if source.is_file() else [])
    weights = [path for path in files if path.suffix in (".safetensors", ".bin", ".gguf")]
    return {
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "model": [str(source.resolve() if files else source), args.base, args.config_from]
        + [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "--columns": args.columns,
        "--column": asked.column,
        "--system": args.system,
        "--max-tokens": args.max_tokens,
    }


def _answer(args: argparse.Namespace, chats: list[Chat], left: list[int], journal: Journal) -> float:
    """Answers these rows. Returns the seconds that it took, the model's loading apart."""
    silence_third_parties()
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # options of sampling, which is not done
    from tqdm import tqdm

    from pissa.cli.cores import Threads
    from pissa.cli.generation import ends_of, generate_each, prompt_tokens, repeats_itself
    from pissa.cli.trained import open_trained

    threads = Threads(args.threads)
    with collect_notes(prints=True):
        model, tokenizer = open_trained(args)
    threads.choose()
    check_template(tokenizer, args.system)
    ends, prompts = ends_of(model, tokenizer), []
    for row in left:
        with user_errors(UserError, before=f"{chats[row].where}: "):
            messages = chats[row].messages
            if args.system is not None and messages[0]["role"] == "user":
                messages = [{"role": "system", "content": args.system}, *messages]
            prompts.append(prompt_tokens(model, tokenizer, messages, "shorten it, or leave the question empty"))
    began = time.perf_counter()
    with tqdm(total=len(chats), initial=len(chats) - len(left), desc="answering", unit=" rows") as bar:
        for place, tokens in generate_each(model, tokenizer, prompts, args.max_tokens, ends):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            ended_by = "" if tokens[-1] in ends else "repeats" if repeats_itself(tokens, tokenizer) else "length"
            journal.add(left[place], Answer(text, ended_by))
            bar.update()
    return time.perf_counter() - began

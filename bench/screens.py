"""What a command shows in a terminal: its last screen, and that as a picture."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pyte
from rich.console import Console

COLUMNS, ROWS = 112, 200  # rows enough that nothing scrolls away


def screen_of(command: Sequence[str], folder: Path) -> list[str]:
    """Runs a command in a terminal of its own, in a folder, and returns the lines that stand there at its end: bars
    have overwritten themselves. A terminal in which this runs shows them as they come, any other output at the end.

    Raises:
        SystemExit: the command failed.
    """
    ours, its = pty.openpty()
    columns = min(COLUMNS, shutil.get_terminal_size((COLUMNS, ROWS)).columns)
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    shown = f"$ {shlex.join(command)}"
    print(f"\n{shown}", flush=True)
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    screen = pyte.Screen(columns, ROWS)
    stream = pyte.ByteStream(screen)
    try:
        while read := _read(ours):
            stream.feed(read)
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), read)
    except BaseException:
        process.terminate()
        raise
    os.close(ours)
    lines = [line.rstrip() for line in screen.display]
    lines = lines[: 1 + max((place for place, line in enumerate(lines) if line), default=-1)]
    if not sys.stdout.isatty():
        print("\n".join(lines), flush=True)
    if code := process.wait():
        raise SystemExit(f"{shown}: failed (exit code {code}); its message is above")
    return [shown, *lines]


def _read(terminal: int) -> bytes:
    """What has been written into a terminal since, or nothing once nobody holds it any more."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux's word for that
        return b""


def draw_screen(lines: Sequence[str], path: Path) -> None:
    """Writes the lines as a terminal's picture (SVG)."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, highlight=False)
        for line in lines:
            console.print(line, markup=False)
        drawn = console.export_svg(title="")
    path.write_text(re.sub(r" *@font-face {.*?}\n", "", drawn, flags=re.DOTALL), encoding="utf-8")  # fonts of a server

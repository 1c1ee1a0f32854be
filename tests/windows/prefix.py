"""Makes a prefix of Wine in which torch and numpy for Windows can be loaded. They import C99's complex functions, which
Wine's ucrtbase.dll lacks. So the prefix gets a ucrtbase.dll of ours: those functions (complex.c), and every other name
forwarded to ucrtwine.dll, a copy of Wine's own.

Usage: prefix.py FOLDER, with a Python whose environment has ziglang and lief. What runs programs there is wine.sh.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lief

HERE = Path(__file__).parent
ZIG = [sys.executable, "-m", "ziglang"]
TARGET = ["-target", "x86_64-windows-gnu"]
WINES_MARK = b"Wine builtin DLL"  # in the file's stub for MS-DOS: Wine then looks for it among its own, by its name


def exported(dll: Path) -> list[str]:
    binary = lief.PE.parse(str(dll))
    return sorted(entry.name for entry in binary.get_export().entries if entry.name)


def import_library(dll: str, names: list[str], out: Path) -> None:
    definition = out.with_suffix(".def")
    definition.write_text("".join(f"{line}\n" for line in [f"LIBRARY {dll}", "EXPORTS", *names]))
    subprocess.run([*ZIG, "dlltool", "-m", "i386:x86-64", "-d", str(definition), "-l", str(out)], check=True)


def replace_ucrtbase(system: Path, scratch: Path) -> None:
    content = bytearray((system / "ucrtbase.dll").read_bytes())
    mark = content.index(WINES_MARK)
    content[mark : mark + len(WINES_MARK)] = bytes(len(WINES_MARK))
    wines, objects = system / "ucrtwine.dll", scratch / "complex.o"
    wines.write_bytes(content)
    compiler = ["-O2", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-ffp-contract=off"]
    subprocess.run([*ZIG, "cc", *TARGET, *compiler, "-c", str(HERE / "complex.c"), "-o", str(objects)], check=True)
    binary = lief.COFF.parse(str(objects))  # held by a name: its symbols do not keep it alive
    ours = [symbol.name for symbol in binary.symbols if symbol.name.startswith("ours_")]
    defined = {name.removeprefix("ours_") for name in ours}
    names = exported(wines)
    if not defined <= set(names):
        raise SystemExit(f"complex.c has functions that no ucrtbase.dll has: {sorted(defined - set(names))}")
    # The real functions that complex.c calls.
    called = sorted(set(re.findall(r"\b[a-z0-9]+(?=\(double)", (HERE / "complex.c").read_text())) & set(names))
    import_library("ucrtwine.dll", called, scratch / "ucrtwine.lib")
    lines = [f"{name}=ours_{name}" if name in defined else f"{name}=ucrtwine.{name}" for name in names]
    definition = scratch / "ucrtbase.def"
    definition.write_text("".join(f"{line}\n" for line in ["LIBRARY ucrtbase.dll", "EXPORTS", *lines]))
    link = [*ZIG, "cc", *TARGET, "-shared", "-nostdlib", "-s", "-o", str(scratch / "ucrtbase.dll")]
    subprocess.run([*link, str(objects), str(scratch / "ucrtwine.lib"), str(definition)], check=True)
    shutil.move(scratch / "ucrtbase.dll", system / "ucrtbase.dll")
    print(f"ucrtbase.dll: {len(names)} names, {len(defined)} of them ours")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    wine = {"WINEPREFIX": str(folder), "WINEARCH": "win64", "WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}
    environment = {**os.environ, **wine}
    for command in (["wineboot", "-i"], ["wineserver", "-w"]):
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as scratch:
        replace_ucrtbase(folder / "drive_c/windows/system32", Path(scratch))


if __name__ == "__main__":
    main()

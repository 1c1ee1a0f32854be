"""Installs wheels as users do, beside the oldest torch that pissa is for and beside the newest, and runs `pissa env`
and `pissa selftest`: in Debian 12, 13 and testing, fresh, and in environments of this machine's Pythons. The table in
docs/install.md is written anew.

Usage: installed.py FOLDER PYTHON...; as root. FOLDER/dist has the wheels; the systems are made in FOLDER, and kept.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "install.md"
BEGIN, END = "<!-- wheels -->", "<!-- /wheels -->"
HEAD = "| Python | torch | machine | system | result |\n|---|---|---|---|---|"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
DEBIANS = [("Debian 12", "bookworm"), ("Debian 13", "trixie"), ("Debian 14, testing", "forky")]


@dataclass
class System:
    """Where wheels are installed: its name, the program `python` there, and what runs a command there."""

    name: str
    python: str
    enter: tuple[str, ...] = ()

    def run(self, *command: str) -> str:
        # The newest torch is wanted, whatever this machine's pip is held to.
        environment = {**os.environ, "PIP_CONSTRAINT": "/dev/null", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [*self.enter, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}, {self.python}: {' '.join(command)}\n{done.stdout}")
        return done.stdout

    def version(self) -> str:
        return self.run(self.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()


def debian(name: str, release: str, folder: Path) -> System:
    """A fresh system in FOLDER/release: Debian's smallest with Python, and this machine's way to the network."""
    root = folder / release
    if not (root / "made").exists():
        shutil.rmtree(root, ignore_errors=True)
        here = System(name, "")
        here.run("debootstrap", "--variant=minbase", "--include=ca-certificates,python3-venv", release, str(root))
        for file in ("etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt"):
            shutil.copyfile(Path("/") / file, root / file)
        (root / "made").touch()
    # FOLDER is there under its own name, and pip's downloads; what is mounted is gone after each command.
    downloads = Path.home() / ".cache/pip"
    mounts = [("/proc", root / "proc"), ("/dev", root / "dev"), ("/sys", root / "sys")]
    mounts += [(str(folder), root / str(folder)[1:]), (str(downloads), root / str(downloads)[1:])]
    for source, target in mounts:
        Path(source).mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
    script = "".join(f"mount --rbind '{source}' '{target}' && " for source, target in mounts)
    script += f"""exec chroot '{root}' env PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@" """
    return System(name, "python3", ("unshare", "-m", "sh", "-c", script, "sh"))


def result(system: System, folder: Path, wheel: Path, torch: str) -> tuple[str, str]:
    """The version of torch that was installed, and what the self-test says. The environment is deleted."""
    environment = folder / "environment"
    python = str(environment / "bin/python")
    try:
        system.run(system.python, "-m", "venv", "--clear", str(environment))
        system.run(python, "-m", "pip", "install", "-q", torch)
        system.run(python, "-m", "pip", "install", "-q", f"{wheel}[cli]")
        installed = system.run(python, "-c", "from importlib.metadata import version; print(version('torch'))").strip()
        system.run(str(environment / "bin/pissa"), "env")
        selftest = system.run(str(environment / "bin/pissa"), "selftest")
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return installed.split("+")[0], re.search(r"\d+ of \d+ checks passed", selftest)[0]


def systems(folder: Path, pythons: list[str]) -> Iterator[System]:
    """The fresh ones, and this one with the Pythons that those have not."""
    fresh = [debian(name, release, folder) for name, release in DEBIANS]
    yield from fresh
    release = platform.freedesktop_os_release()
    here = [System(f"{release['NAME']} {release['VERSION_ID']}", python) for python in pythons]
    theirs = {system.version() for system in fresh}
    yield from (system for system in here if system.version() not in theirs)


def write(rows: list[list[str]]) -> None:
    table = "\n".join([BEGIN, "", HEAD, *(f"| {' | '.join(row)} |" for row in rows), "", ""])
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + table + page[page.index(END) :])


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    this = platform.machine()
    wheels: dict[tuple[str, str], Path] = {}
    for wheel in (folder / "dist").glob("*.whl"):
        minor, machine = re.search(r"-cp3(\d+)-manylinux_\d+_\d+_(\w+)$", wheel.stem).groups()
        wheels[f"3.{minor}", machine] = wheel
    oldest = re.search(r'^dependencies = \["torch>=([0-9.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    # A row for each, in which what has passed is written when it has; this takes long.
    rows, to_run = [], []
    at = {system.version(): system for system in systems(folder, sys.argv[2:])}
    for python in PYTHONS:
        if (python, this) in wheels and python in at:
            for wanted in (f"{oldest}.*", "newest"):
                rows.append([python, wanted, this, at[python].name, "not run"])
                to_run.append((rows[-1], at[python], f"torch=={wanted}" if wanted != "newest" else "torch"))
        else:
            rows.append([python, "", this, "", "not built"])
    for python in PYTHONS:
        built = (python, "aarch64") in wheels
        rows.append([python, "", "aarch64", "", "built and inspected, not run" if built else "not built"])
    for row, system, torch in to_run:
        row[1], row[4] = result(system, folder, wheels[row[0], this], torch)
        print(*row, flush=True)
        write(rows)


if __name__ == "__main__":
    main()

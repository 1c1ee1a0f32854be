"""Installs the packages that this machine lacks from the prepared folder.

    python -m bench.gpu.packages PREPARED_DIR SITE

A package is taken if it is not installed or the installed one is older. SITE is the folder to put packages into. It
must be on PYTHONPATH.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from bench.compare.records import version


def take(prepared: Path, site: Path) -> None:
    for wheel in sorted(prepared.glob("wheels/*.whl")):
        name, offered = wheel.name.split("-")[:2]
        if (installed := version(name)) and _number(installed) >= _number(offered):
            continue
        print("from the prepared folder:", name, offered)
        zipfile.ZipFile(wheel).extractall(site)
    # In a process of its own: a library that does not load may not be imported twice.
    if subprocess.run([sys.executable, "-c", "import bitsandbytes"], capture_output=True, check=False).returncode:
        shutil.copytree(prepared / "site", site, dirs_exist_ok=True)


def _number(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")[:3]]


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))

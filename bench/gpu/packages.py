"""Fetches from the prepared folder the packages that this machine lacks, and lists what is there.

    python -m bench.gpu.packages SITE [PREPARED_DIR]

A package is taken if none is installed or an older one. SITE is the folder to put them in; it must be on PYTHONPATH.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from bench.compare.packages import version

USED = (
    *("torch", "numpy", "pybind11", "safetensors", "transformers", "accelerate", "peft", "tqdm", "xxhash"),
    *("pytest", "hypothesis", "bitsandbytes"),
)


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
    importlib.invalidate_caches()


def _number(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")[:3]]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        take(Path(sys.argv[2]), Path(sys.argv[1]))
    print("python", sys.version.split()[0], *(f"{name} {version(name) or 'none'}" for name in USED), sep=", ")

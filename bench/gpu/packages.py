"""Fetches from the prepared folder the packages that this machine lacks, and lists what is there.

    python -m bench.gpu.packages SITE [PREPARED_DIR]

A package is taken if none is installed or an older one. SITE is the folder to put them in; it must be on PYTHONPATH.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

NEEDED = (
    *("pybind11", "numpy", "safetensors", "transformers", "accelerate", "peft", "tqdm"),
    *("pytest", "hypothesis", "bitsandbytes"),
)


def take(prepared: Path, site: Path) -> None:
    for wheel in sorted(prepared.glob("wheels/*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            if _number(importlib.metadata.version(name)) >= _number(version):
                continue
        except importlib.metadata.PackageNotFoundError:
            pass
        print("from the prepared folder:", name, version)
        zipfile.ZipFile(wheel).extractall(site)
    # In a process of its own: a library that does not load may not be imported twice.
    if subprocess.run([sys.executable, "-c", "import bitsandbytes"], capture_output=True, check=False).returncode:
        shutil.copytree(prepared / "site", site, dirs_exist_ok=True)
    importlib.invalidate_caches()


def _number(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")[:3]]


def missing() -> list[str]:
    """Prints the versions of the packages that a run needs. Returns those that do not import, each with its reason."""
    import torch

    python = sys.version.split()[0]
    print("python", python, "torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name())
    found = []
    for package in NEEDED:
        try:
            importlib.import_module(package)
            print(package, importlib.metadata.version(package))
        except Exception as error:
            found.append(f"{package} ({type(error).__name__}: {error})")
    return found


if __name__ == "__main__":
    if len(sys.argv) > 2:
        take(Path(sys.argv[2]), Path(sys.argv[1]))
    if lacking := missing():
        sys.exit("missing: " + ", ".join(lacking))

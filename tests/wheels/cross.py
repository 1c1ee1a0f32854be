"""What wheels for macOS and for Windows have in common: both are cross-compiled by zig, and inspected."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ziglang

ROOT = Path(__file__).parents[2]


def copy_python_headers(python: str, out: Path) -> None:
    """This machine's: all but pyconfig.h is the same on every system."""
    code = "import sysconfig as s; print(s.get_path('include'), s.get_config_var('MULTIARCH') or '', sep='\\n')"
    include, machine = subprocess.check_output([python, "-c", code], text=True).splitlines()
    headers = Path(include)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(headers, out)
    # Debian's pyconfig.h only includes that of the compiler's architecture, from a folder of its own.
    config = headers.parent / machine / headers.name / "pyconfig.h"
    if config.is_file():
        shutil.copy2(config, out)


def build(
    out: Path, python: str, toolchain: str, suffix: str, environment: dict[str, str], settings: dict[str, str]
) -> Path:
    """The wheel, alone in the folder `out`."""
    environment = {
        **os.environ,
        "PATH": f"{Path(ziglang.__file__).parent}:{os.environ['PATH']}",
        "SETUPTOOLS_EXT_SUFFIX": suffix,
        **environment,
    }
    settings = {
        "install.strip": "false",  # this machine's strip does not know the format
        "cmake.define.CMAKE_TOOLCHAIN_FILE": str(ROOT / "cpp/cmake" / toolchain),
        "cmake.define.PYTHON_MODULE_EXTENSION": suffix,
        "cmake.define.PISSA_CUDA": "OFF",
        "cmake.define.PISSA_WERROR": "ON",
        **settings,
    }
    shutil.rmtree(out, ignore_errors=True)
    wheel = [python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out)]
    wheel += [f"--config-settings={name}={value}" for name, value in settings.items()]
    subprocess.run([*wheel, str(ROOT)], env=environment, check=True)
    (built,) = out.iterdir()
    return built


def all_hold(wheel: Path, checks: dict[str, tuple[Any, Any]]) -> bool:
    """Whether each of the checks got what is needed; those that did not are printed."""
    for what, (got, needed) in checks.items():
        if got != needed:
            print(f"{wheel.name}: {what}\n  needed: {needed}\n  got:    {got}", file=sys.stderr)
    return all(got == needed for got, needed in checks.values())

"""`pissa env`: reports what is installed, and what the core was built for. `pissa selftest` checks that it works."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from importlib import metadata
from typing import Any

from pissa.system import busy_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the report. Returns 0 if no package is too old, otherwise 1."""
    report = environment()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0 if report["fits"] else 1
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:<{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0 if report["fits"] else 1


def environment() -> dict[str, Any]:
    """Returns the report as names and values. The last two are `fits` and `verdict`."""
    import torch

    import pissa
    from pissa.ops._load import FORCED

    least, info, libc = needed(), pissa.build_info(), platform.libc_ver()
    versions = {name: _version(name) for name in (*least, "bitsandbytes")}
    report: dict[str, Any] = {
        "pissa": pissa.__version__,
        "platform": platform.platform(),
        **({"libc": " ".join(libc)} if any(libc) else {}),
        "python": platform.python_version(),
        **{name: version or "not installed" for name, version in versions.items()},
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cores": _cores(),
        **{f"build: {key}": value for key, value in info.items() if key not in ("version", "cuda")},
        "cuda": _cuda(info["cuda"]),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith("PISSA_")},
    }
    if FORCED:
        report["PISSA_COMPOSITE"] += ": PyTorch's operations compute, and pissa's kernels do not"
    old = [name for name, version in least.items() if _numbers(versions[name] or version) < _numbers(version)]
    missing = [name for name in least if versions[name] is None]
    verdict = "all versions fit; `pissa selftest` checks that everything works"
    if old:
        those = "; ".join(f"{name} {versions[name]} is older than {least[name]}" for name in old)
        verdict = f"{those}: run `pip install --upgrade {' '.join(old)}`"
    elif missing:
        verdict = f"pissa.ops works; for models also run `pip install {' '.join(missing)}`, or install pissa[cli]"
    return report | {"fits": not old, "verdict": verdict}


def _cores() -> str:
    """Their number, and how many are busy, where the system knows."""
    busy = busy_cores()
    return f"{os.cpu_count()}" + ("" if busy is None else f"; in the last minute programs kept {busy:.1f} of them busy")


def _cuda(build: dict[str, Any] | None) -> str:
    """The CUDA runtime and architectures that the library was built for, the device and what its self-test found, or
    the reason for not using it."""
    import torch

    from pissa.ops._load import cuda_problem, routes

    if cuda_problem is not None or build is None:
        return f"not used: {cuda_problem}"
    device = f"{torch.cuda.get_device_name()}; {routes()}" if torch.cuda.is_available() else "no device found"
    return f"{build['runtime']}, for {' '.join(build['architectures'])}; {device}"


def needed() -> dict[str, str]:
    """The minimum versions of the packages that `pissa[cli]` requires, from its metadata. Without the packages of the
    extras, only `pissa.ops` works."""
    requirements = (
        re.fullmatch(r"""([\w-]+)>=([\d.]+)(?: ?; extra == ["'](?:hf|cli)["'])?""", line)
        for line in metadata.requires("pissa") or []
    )
    return {requirement[1]: requirement[2] for requirement in requirements if requirement is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" gives (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].strip(".").split("."))  # type: ignore[index]

"""Builds pissa's wheel for macOS on arm64 with zig, on another system, and inspects it: for which system the module is,
what it links, what it exports, and which library has each name that it needs. Nothing of it is run.

Usage: macos.py FOLDER PYTHON. The wheel is for PYTHON's version; PYTHON has what a build needs. FOLDER/torch-macos has
torch's wheel for macOS, unpacked. The wheel is put into FOLDER/dist-macos.
"""

from __future__ import annotations

import collections
import fnmatch
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import cross
import lief

TORCH, LIBCXX, LIBSYSTEM = "@rpath/libtorch_cpu.dylib", "/usr/lib/libc++.1.dylib", "/usr/lib/libSystem.B.dylib"
# What zig's linker exports of every library. Each name of a library that is loaded later names the library it is in, so
# nothing is bound to these.
ZIGS_OWN = {"__mh_dylib_header", "___dso_handle"}
PYTHONS = re.compile("__?Py")
lief.logging.disable()  # it complains of a table that is empty; a file that it cannot read is None


def read(path: Path) -> lief.MachO.Binary:
    config = lief.MachO.ParserConfig()
    config.parse_dyld_exports = config.parse_dyld_bindings = config.parse_dyld_rebases = False
    return lief.MachO.parse(str(path), config).at(0)


def linked(binary: lief.MachO.Binary) -> list[str]:
    commands = [command for command in binary.commands if isinstance(command, lief.MachO.DylibCommand)]
    return [command.name for command in commands if command.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB]


def libraries_of_names(binary: lief.MachO.Binary) -> dict[str, str]:
    """Of each name that it needs, the library that it is bound to; of none, the loader looks in all that are loaded."""
    libraries = dict(enumerate(linked(binary), 1))
    undefined = [symbol for symbol in binary.symbols if symbol.category == lief.MachO.Symbol.CATEGORY.UNDEFINED]
    return {symbol.name: libraries.get(symbol.library_ordinal, "") for symbol in undefined}


def write_libcxx(torch: Path, path: Path) -> None:
    """A description of Apple's C++ library to link with: the names of it that torch's libraries need, which run on the
    same systems."""
    names = {
        name
        for library in ("libc10", "libtorch_cpu", "libtorch_python")
        for name, where in libraries_of_names(read(torch / f"lib/{library}.dylib")).items()
        if where == LIBCXX
    }
    target = "targets: [arm64-macos]"
    path.write_text(
        f"--- !tapi-tbd\ntbd-version: 4\n{target}\ninstall-name: '{LIBCXX}'\n"
        f"exports:\n  - {target}\n    symbols: [{', '.join(sorted(names))}]\n...\n"
    )


def build(folder: Path, python: str) -> Path:
    libcxx, headers = folder / "libc++.tbd", folder / "headers-macos"
    write_libcxx(folder / "torch-macos/torch", libcxx)
    # The sizes of types are the same on macOS, and a call that it lacks would not link.
    cross.copy_python_headers(python, headers)
    suffix = subprocess.check_output(
        [python, "-c", "import sys; print('.cpython-%d%d-darwin.so' % sys.version_info[:2])"], text=True
    ).strip()
    environment = {
        "PYTHONPATH": str(folder / "torch-macos"),  # CMake asks Python where torch is
        "PISSA_MACOS_LIBCXX": str(libcxx),
        "_PYTHON_HOST_PLATFORM": "macosx-14.0-arm64",
    }
    settings = {"build-dir": str(folder / "macos-arm64"), "cmake.define.Python_INCLUDE_DIR": str(headers)}
    return cross.build(folder / "dist-macos", python, "aarch64-macos.cmake", suffix, environment, settings)


def inspect(wheel: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = fnmatch.filter(archive.namelist(), "pissa/_C.*.so")
        module = read(Path(archive.extract(name, folder)))
    needed = libraries_of_names(module)
    exported = {symbol.name for symbol in module.symbols if symbol.category == lief.MachO.Symbol.CATEGORY.EXTERNAL}
    version = module.build_version
    checks = {
        "tag": (wheel.stem.rpartition("-")[2], "macosx_14_0_arm64"),
        "system": (
            f"{module.header.cpu_type.name}, {version.platform.name} {version.minos}",
            "ARM64, MACOS [14, 0, 0]",
        ),
        "signed": (module.has_code_signature, True),  # without, no Mac with this processor loads it
        "linked libraries": (sorted(linked(module)), sorted([TORCH, LIBCXX, LIBSYSTEM])),
        "paths to them": ([command.path for command in module.rpaths], []),  # `import torch` has loaded torch's
        "exported": (sorted(exported - ZIGS_OWN), ["_PyInit__C"]),
        "C++ names of torch": (
            [name for name, where in needed.items() if where == TORCH and name.startswith("__Z")],
            [],
        ),
        # The linker has found the others in the library that they are bound to.
        "names in no library": ([name for name, where in needed.items() if not where and not PYTHONS.match(name)], []),
    }
    counts = collections.Counter(Path(where).name or "Python" for where in needed.values())
    names = ", ".join(f"{count} of {where}" for where, count in counts.most_common())
    print(f"{wheel.name}, {wheel.stat().st_size >> 10} KiB, needs names: {names}")
    return cross.all_hold(wheel, checks)


def main() -> int:
    folder, python = Path(sys.argv[1]).resolve(), sys.argv[2]
    start = time.monotonic()
    wheel = build(folder, python)
    print(f"Built in {time.monotonic() - start:.0f} s; not run")
    return 0 if inspect(wheel) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Builds pissa's wheel for Windows on x86-64 with zig, on another system, and inspects it: for which system the module
is, what it links, what it exports, and which instruction sets it has code for. tests/windows runs it.

Usage: windows.py FOLDER, with a Python of the version that the wheel is for, which has what a build needs.
FOLDER/python has Windows' Python with torch (tests/windows/python.py). The wheel is put into FOLDER/dist.
"""

from __future__ import annotations

import collections
import fnmatch
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import cross
import lief

# The C library is a part of Windows since 10: the names of its parts lead to ucrtbase.dll. No other runtime is needed:
# the C++ library is in the module.
SYSTEM, C_LIBRARY = "kernel32.dll", "api-ms-win-crt-*.dll"
PYBIND11 = "8pybind11"  # a mangled name in its namespace: it exports its exceptions on Windows
# An instruction of each set that goes beyond the set before it. Its prefix tells AVX-VNNI's from AVX512-VNNI's.
INSTRUCTIONS = {
    "avx2": "vfmadd231ps.*%ymm",
    "avxvnni": r"\{vex\} vpdpbusd",
    "avx512": "vfmadd231ps.*%zmm",
    "avx512vnni": "vpdpbusd.*%zmm",
    "avx512bf16": "vdpbf16ps",
    "amxbf16": "tdpbf16ps",
}


def write_import_library(dll: Path, out: Path) -> None:
    """To link with: the DLL's names. Those that are in a section without code are data, which is reached otherwise."""
    binary = lief.PE.parse(str(dll))
    execute = int(lief.PE.Section.CHARACTERISTICS.MEM_EXECUTE)
    code = [s for s in binary.sections if s.characteristics & execute]

    def of(entry: lief.PE.ExportEntry) -> str:
        in_code = any(s.virtual_address <= entry.address < s.virtual_address + s.virtual_size for s in code)
        return f"{entry.name}{'' if in_code else ' DATA'}"

    lines = [f"LIBRARY {dll.name}", "EXPORTS", *(of(entry) for entry in binary.get_export().entries if entry.name)]
    definition = out.with_suffix(".def")
    definition.write_text("".join(f"{line}\n" for line in lines))
    zig = [sys.executable, "-m", "ziglang", "dlltool", "-m", "i386:x86-64"]
    subprocess.run([*zig, "-d", str(definition), "-l", str(out)], check=True)


def build(folder: Path) -> Path:
    headers, torch = folder / "headers", folder / "torch"
    cross.copy_python_headers(sys.executable, headers)
    shutil.copyfile(Path(__file__).parent / "pyconfig_windows.h", headers / "pyconfig.h")
    digits = f"{sys.version_info.major}{sys.version_info.minor}"
    library = folder / f"python{digits}.lib"
    write_import_library(folder / f"python/python{digits}.dll", library)
    # torch alone: this machine's Python can import none of the other packages there.
    torch.mkdir(exist_ok=True)
    link = torch / "torch"
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "python/Lib/site-packages/torch")
    environment = {
        "PYTHONPATH": str(torch),  # CMake asks Python where torch is
        "_PYTHON_HOST_PLATFORM": "win-amd64",
    }
    settings = {
        "build-dir": str(folder / "wheel"),
        "cmake.define.Python_INCLUDE_DIR": str(headers),
        "cmake.define.Python_LIBRARY": str(library),
    }
    suffix = f".cp{digits}-win_amd64.pyd"
    return cross.build(folder / "dist", sys.executable, "x86_64-windows.cmake", suffix, environment, settings)


def inspect(wheel: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = fnmatch.filter(archive.namelist(), "pissa/_C.*.pyd")
        path = archive.extract(name, folder)
        module = lief.PE.parse(path)
        disassembly = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", path], text=True)
    needed = {library.name.lower(): [entry.name for entry in library.entries] for library in module.imports}
    exported = [entry.name for entry in module.get_export().entries]
    torch = needed.get("torch_cpu.dll", [])
    python = f"python{sys.version_info.major}{sys.version_info.minor}.dll"
    linked = {name if not fnmatch.fnmatch(name, C_LIBRARY) else C_LIBRARY for name in needed}
    checks = {
        "tag": (wheel.stem.rpartition("-")[2], "win_amd64"),
        "system": (f"{module.header.machine.name}, PE{module.optional_header.magic.name}", "AMD64, PEPE32_PLUS"),
        "linked libraries": (sorted(linked), sorted(["torch_cpu.dll", python, SYSTEM, C_LIBRARY])),
        "exported": ([name for name in exported if PYBIND11 not in name], ["PyInit__C"]),
        "C++ names of torch": ([name for name in torch if name.startswith(("?", "_Z"))], []),
        "instruction sets": (
            [isa for isa, instruction in INSTRUCTIONS.items() if re.search(instruction, disassembly)],
            list(INSTRUCTIONS),
        ),
    }
    counts = collections.Counter({name: len(names) for name, names in needed.items() if "-crt-" not in name})
    counts["the C library"] = sum(len(names) for name, names in needed.items() if "-crt-" in name)
    names = ", ".join(f"{count} of {where}" for where, count in counts.most_common())
    print(f"{wheel.name}, {wheel.stat().st_size >> 10} KiB, needs names: {names}")
    return cross.all_hold(wheel, checks)


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    start = time.monotonic()
    wheel = build(folder)
    print(f"Built in {time.monotonic() - start:.0f} s")
    return 0 if inspect(wheel) else 1


if __name__ == "__main__":
    sys.exit(main())

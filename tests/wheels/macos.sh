#!/bin/sh
# Compiles the core, the CPU backend and the module for macOS on arm64, with zig's clang and the headers of Apple's libc that it
# brings: whether they compile, against Apple's ABI, no more. Python's pyconfig.h and torch's headers are this machine's.
# Usage: macos.sh ZIG PYTHON; PYTHON has torch, pybind11 and Eigen.
set -eu
zig=$1 python=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
includes=$("$python" - "$folder/python" <<'EOP'
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

site, headers = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("include"))
shutil.copytree(headers, sys.argv[1])
# Debian's pyconfig.h only includes that of the compiler's architecture, from a folder of its own.
config = Path("/usr/include", sysconfig.get_config_var("MULTIARCH") or "", headers.name, "pyconfig.h")
if config.is_file():
    shutil.copy(config, sys.argv[1])
folders = [sys.argv[1], site / "cmeel.prefix/include/eigen3"]
folders += [Path(importlib.util.find_spec(name).origin).parent / "include" for name in ("pybind11", "torch")]
print(*(f"-isystem {folder}" for folder in folders))
EOP
)
failed=0

compile() {  # SOURCE OPTION...
  # shellcheck disable=SC2086
  "$zig" c++ -target aarch64-macos.14.0 -std=c++20 -O2 -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -DPISSA_ARM \
    -DTORCH_TARGET_VERSION=0x020a000000000000ULL -DPISSA_TORCH_TARGET='"2.10"' -DPISSA_VERSION='"0"' -DPISSA_COMPILER='"zig"' \
    -Icpp $includes "$@" -c -o "$folder/object" || { echo "$* does not compile for macOS on arm64" >&2; failed=1; }
}

compile cpp/pissa/cpu/kernels.cc -DPISSA_ISA=baseline
compile cpp/pissa/cpu/kernels.cc -DPISSA_ISA=neonbf16 -mcpu=generic+v8_2a+bf16
for source in cpp/pissa/cpu/*.cc cpp/pissa/python/*.cc cpp/pissa/torch/schema.cc cpp/pissa/torch/ops_cpu.cc; do
  [ "$source" = cpp/pissa/cpu/kernels.cc ] || compile "$source"
done
exit $failed

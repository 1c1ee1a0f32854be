#!/bin/sh
# Compiles cpp/pissa/torch/*.cc, syntax only, against the headers of the oldest torch that pyproject.toml allows, of 2.11 and 2.12,
# and of the newest: a name that a later torch brought, or an earlier one lost, is found here. CUDA's headers are those of
# the simulation. torch's come out of its wheels for macOS, which are small and have the same ones, and are kept in FOLDER.
# Usage: torch_headers.sh FOLDER PYTHON [VERSION...]   of the versions named alone
set -eu
folder=$1 python=$2
shift 2
oldest=$(sed -n 's/^dependencies = \["torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
[ -n "$oldest" ] || { echo "pyproject.toml: no torch>= at the head of dependencies" >&2; exit 1; }
failed=0

headers() {  # VERSION: downloads the wheel unless its headers are there; keeps include/torch
  [ -d "$folder/$1" ] && return
  mkdir -p "$folder/wheel"
  case $1 in newest) wanted=torch ;; *) wanted="torch==$1.*" ;; esac
  # Whatever pip is held to for this machine's Python: nothing is installed.
  PIP_CONSTRAINT=/dev/null "$python" -m pip download -q --no-deps --only-binary :all: \
    --platform macosx_15_0_arm64 --python-version 3.12 --dest "$folder/wheel" "$wanted"
  "$python" - "$folder/wheel" "$folder/$1" <<'EOP'
import sys
import zipfile
from pathlib import Path

(path,) = Path(sys.argv[1]).iterdir()
with zipfile.ZipFile(path) as wheel:
    wheel.extractall(f"{sys.argv[2]}.partial", [name for name in wheel.namelist() if name.startswith("torch/include/torch/")])
Path(sys.argv[2] + ".partial", "version").write_text(path.name.split("-")[1])
Path(sys.argv[2] + ".partial").rename(sys.argv[2])
EOP
  rm -r "$folder/wheel"
}

[ $# -gt 0 ] || set -- "$oldest" 2.11 2.12 newest
for version; do
  headers "$version"
  for source in cpp/pissa/torch/*.cc; do
    case $source in
      *cuda*) backend="-isystem tests/cpp/cuda_sim -DUSE_CUDA" ;;
      *) backend="" ;;
    esac
    # shellcheck disable=SC2086
    c++ -std=c++20 -fsyntax-only -fvisibility=hidden -Wall -Wextra -Werror -DTORCH_TARGET_VERSION=0x020a000000000000ULL \
      -isystem "$folder/$version/torch/include" -Icpp $backend "$source" || {
      echo "$source does not compile with the headers of torch $(cat "$folder/$version/version")" >&2
      failed=1
    }
  done
done
exit $failed

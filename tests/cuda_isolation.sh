#!/bin/sh
# What pip's build isolation hides is found: configures with PISSA_CUDA=ON where PYTHON, an environment with CUDA's packages,
# does not see them, as pip has it: by a sitecustomize on PYTHONPATH.
# Usage: cuda_isolation.sh PYTHON
set -eu
python=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" - >"$folder/sitecustomize.py" <<'EOP'
import sysconfig

print(f"import sys\nsys.path[:] = [path for path in sys.path if path != {sysconfig.get_path('purelib')!r}]")
EOP
unset VIRTUAL_ENV
if ! output=$(PYTHONPATH=$folder cmake -S . -B "$folder/build" -DPISSA_BUILD_PYTHON=OFF -DPISSA_CUDA=ON \
  -DPython_EXECUTABLE="$python" 2>&1); then
  printf '%s\nUnder build isolation PISSA_CUDA=ON does not find what %s has\n' "$output" "$python" >&2
  exit 1
fi

#!/bin/sh
# A wheel with the CUDA library, of any architecture, on a machine without a GPU: what the library links, where it looks for
# it, what of torch and of its own it shows, for which GPUs it has code, how large it is; and, if PYTHON is given, that beside
# its torch the wheel imports without a word.
# Usage: cuda_wheel.sh WHEEL CUOBJDUMP [PYTHON]; GPUS names the architectures that it was built for, if not all, as CMake does.
set -eu
wheel=$(realpath "$1") cuobjdump=$2 python=${3-}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

expect() {  # WHAT NEEDED GOT
  [ "$2" = "$3" ] && return
  printf '%s\n  needed: %s\n  got:    %s\n' "$1" "$2" "$3" >&2
  failed=1
}
line() { LC_ALL=C sort -Vu | tr '\n' ' ' | sed 's/ $//'; }
# Names of the global dynamic symbols whose section is, or is not, UND. Unlike nm, readelf reads every architecture.
symbols() {
  readelf -W --dyn-syms "$library" |
    awk -v test="$1" '$8 != "" && $5 != "LOCAL" && ($7 == "UND") == (test == "undefined") && $1 ~ /^[0-9]+:$/ {sub("@.*", "", $8); print $8}'
}

cmake -E chdir "$folder" cmake -E tar xf "$wheel"  # which unpacks zip, too
library=$folder/pissa/libpissa_cuda13.so
[ -f "$library" ] || { echo "$wheel has no pissa/libpissa_cuda13.so" >&2; exit 1; }

# libc and what belongs to it is everywhere; older ones keep threads, timers and the loader's functions in files of their own.
needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
expect "NEEDED of CUDA and torch" "libcublasLt.so.13 libcublas.so.13 libcusolver.so.12 libtorch_cpu.so libtorch_cuda.so" \
  "$(echo "$needed" | grep -Ev '^(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s)\.so\..*|libstdc\+\+\.so\.6)$' | line)"
expect "RUNPATH" "(RUNPATH) [\$ORIGIN/../nvidia/cu13/lib]" \
  "$(readelf -d "$library" | sed -n 's/.*\((R.*PATH)\).*\(\[.*\]\)/\1 \2/p' | line)"

# torch: C functions only, for C++ names of at, c10 and torch change between releases. CUDA: no driver and no runtime; the
# latter is inside, and its symbols must not show, for torch has a runtime of its own in the process.
undefined=$(symbols undefined)
[ -n "$undefined" ] || expect "undefined symbols" "torch's, libc's" ""
expect "undefined C++ names of torch" "" "$(echo "$undefined" | grep -E '^_ZNK?(2at|3c10|5torch|6caffe2)' | line)"
expect "undefined functions of CUDA's driver and runtime" "" "$(echo "$undefined" | grep -E '^_*cu(da)?[A-Z]' | line)"
expect "symbols that show" "" "$(symbols defined | grep -v '^_Z' | line)"

gpus=$(echo "${GPUS:-all}" | sed 's/^all$/75 80 86 89 90 100 110 120/; s/-[a-z]*//g; s/;/ /g')
expect "code for GPUs" "$gpus" \
  "$("$cuobjdump" --list-elf "$library" | sed -n 's/.*\.sm_\([0-9a-z]*\)\.cubin/\1/p' | line)"
expect "PTX" "120" "$("$cuobjdump" --list-ptx "$library" | sed -n 's/.*\.sm_\([0-9a-z]*\)\.ptx/\1/p' | line)"

# In MiB. Compressed by nvcc: without, it has six times as many.
size=$(($(stat -c %s "$library") >> 20))
echo "$(basename "$wheel"): the CUDA library has $size MiB, the wheel $(($(stat -c %s "$wheel") >> 20))"
[ $size -le 12 ] || expect "size of the CUDA library, MiB" "at most 12" "$size"

grep -q '"CUDA runtime"' "$folder"/pissa-*.dist-info/sboms/pissa.cdx.json || expect "listed among the parts" "CUDA runtime" ""

[ -n "$python" ] || exit $failed
output=$(EXPECTED_GPUS=$gpus PYTHONPATH=$folder "$python" -W error - 2>&1 <<'EOF'
import os
from pathlib import Path

import pissa
import torch
from pissa import ops
from pissa.ops import _load

assert not torch.cuda.is_initialized()
fits = torch.version.cuda is not None and torch.version.cuda.startswith("13.")
loaded = "libpissa_cuda13.so" in Path("/proc/self/maps").read_text()
assert loaded == fits == (_load.cuda_problem is None), (torch.__version__, loaded, _load.cuda_problem)
cuda = pissa.build_info()["cuda"]
assert cuda["runtime"].startswith("13."), cuda
assert cuda["architectures"] == os.environ["EXPECTED_GPUS"].split(), cuda
weight = torch.randn(48, 32)
left, singular, right = ops.svd_lowrank(weight, 32)
assert torch.allclose(left * singular @ right.mT, weight, atol=1e-4)
print("works, in", *pissa.__path__)
EOF
) || failed=1
expect "beside the torch of $python" "works, in $folder/pissa" "$output"
exit $failed

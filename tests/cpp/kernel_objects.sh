#!/bin/sh
# The objects of kernels.cc, one per instruction set, and the rest of the library, by nm and objdump:
# - kernel objects define no weak function but in their own namespace: the linker would keep one copy for all, maybe the one
#   with AVX-512;
# - zmm registers occur only in the AVX-512 object, ymm registers only there and in the AVX2 one.
# Usage: kernel_objects.sh NM OBJDUMP BASELINE AVX2 AVX512 OTHERS...
set -eu
nm=$1 objdump=$2 baseline=$3 avx2=$4 avx512=$5
shift 5
failed=0

expect_unshared() {  # ISA OBJECT
  shared=$("$nm" -C "$2" | grep ' W ' | grep -v -e "pissa::cpu::$1::" -e ' W DW.ref.' || true)
  [ -z "$shared" ] && return
  echo "$2 defines functions that another object may replace, or be replaced by:"
  echo "$shared"
  failed=1
}
count() {  # PATTERN OBJECTS...
  pattern=$1
  shift
  "$objdump" -d --no-show-raw-insn "$@" | grep -c "$pattern" || true
}
expect_none() {  # PATTERN OBJECTS...
  found=$(count "$@")
  [ "$found" -eq 0 ] && return
  echo "$found instructions match $*"
  failed=1
}

expect_unshared baseline "$baseline"
expect_unshared avx2 "$avx2"
expect_unshared avx512 "$avx512"
expect_none '%[yz]mm' "$baseline" "$@"
expect_none '%zmm' "$avx2"
[ "$(count '%ymm' "$avx2")" -gt 0 ] || { echo "no ymm register in $avx2: is it the AVX2 object?"; failed=1; }
[ "$(count '%zmm' "$avx512")" -gt 0 ] || { echo "no zmm register in $avx512: is it the AVX-512 object?"; failed=1; }
exit $failed

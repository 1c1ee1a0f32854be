#!/bin/sh
# The objects of kernels.cc, one per instruction set, and the rest of the library, by nm and objdump:
# - kernel objects define no weak function but in their own namespace: the linker would keep one copy for all, maybe the one
#   with AVX-512;
# - zmm registers occur only in the AVX-512 objects, ymm registers only there and in the AVX2 one, products of bf16 pairs
#   only in the one for AVX512_BF16.
# Usage: kernel_objects.sh CXX NM OBJDUMP BASELINE AVX2 AVX512 AVX512BF16 OTHERS...
set -eu
cxx=$1 nm=$2 objdump=$3 baseline=$4 avx2=$5 avx512=$6 avx512bf16=$7
shift 7
failed=0

expect_unshared() {  # ISA OBJECT
  shared=$("$nm" -C "$2" | grep ' W ' | grep -v -e "pissa::cpu::$1::" -e ' W DW.ref.' || true)
  [ -z "$shared" ] && return
  echo "$2 defines functions that another object may replace, or be replaced by:"
  echo "$shared"
  failed=1
}
count() {  # PATTERN OBJECT
  "$objdump" -d --no-show-raw-insn "$2" | grep -c "$1" || true
}
expect_none() {  # PATTERN OBJECT
  found=$(count "$1" "$2")
  [ "$found" -eq 0 ] && return
  echo "$found instructions of $2 match $1"
  failed=1
}

expect_unshared baseline "$baseline"
expect_unshared avx2 "$avx2"
expect_unshared avx512 "$avx512"
expect_unshared avx512bf16 "$avx512bf16"
expect_none '%[yz]mm' "$baseline"
expect_none '%zmm' "$avx2"
expect_none 'vdpbf16ps\|vcvtn[a-z0-9]*bf16' "$avx512"
others=$(mktemp)
trap 'rm -f "$others"' EXIT
"$cxx" -shared -o "$others" "$@"  # linked: objdump takes minutes over the thousands of sections of a debug build's objects
expect_none '%[yz]mm' "$others"
[ "$(count '%ymm' "$avx2")" -gt 0 ] || { echo "no ymm register in $avx2: is it the AVX2 object?"; failed=1; }
[ "$(count '%zmm' "$avx512")" -gt 0 ] || { echo "no zmm register in $avx512: is it the AVX-512 object?"; failed=1; }
[ "$(count 'vdpbf16ps' "$avx512bf16")" -gt 0 ] || { echo "no vdpbf16ps in $avx512bf16"; failed=1; }
exit $failed

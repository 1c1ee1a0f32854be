#!/bin/sh
# The objects of kernels.cc, one per instruction set, and the rest of the library, by nm and objdump:
# - kernel objects define no weak function but in their own namespace: the linker would keep one copy for all, maybe the one
#   with AVX-512;
# - an instruction set's registers and instructions occur in its own object, and in those that go beyond it, only.
# Usage: kernel_objects.sh CXX NM OBJDUMP ISA=OBJECT... -- OTHERS...
set -eu
cxx=$1 nm=$2 objdump=$3
shift 3
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
expect_some() {  # PATTERN OBJECT
  [ "$(count "$1" "$2")" -gt 0 ] && return
  echo "no instruction of $2 matches $1: is it the object of that instruction set?"
  failed=1
}

beyond_baseline='%[yzt]mm\|[[:space:]]\(sdot\|bf\(dot\|cvt\|mmla\)\)'  # of x86-64 and of AArch64
while [ "$1" != -- ]; do
  isa=${1%%=*} object=${1#*=}
  shift
  expect_unshared "$isa" "$object"
  case $isa in
    baseline) expect_none "$beyond_baseline" "$object" ;;
    avx2) expect_none '%zmm\|vpdpbusd' "$object"; expect_some '%ymm' "$object" ;;
    avxvnni) expect_none '%zmm' "$object"; expect_some '{vex} vpdpbusd' "$object" ;;
    avx512) expect_none 'vpdpbusd\|vdpbf16ps\|vcvtn[a-z0-9]*bf16' "$object"; expect_some '%zmm' "$object" ;;
    avx512vnni) expect_none 'vdpbf16ps\|vcvtn[a-z0-9]*bf16' "$object"; expect_some 'vpdpbusd' "$object" ;;
    avx512bf16) expect_none 'tdpbf16ps' "$object"; expect_some 'vdpbf16ps' "$object" ;;
    amxbf16) expect_some 'tdpbf16ps' "$object" ;;
    neondot) expect_none '[[:space:]]bf\(dot\|cvt\|mmla\)' "$object"; expect_some '[[:space:]]sdot' "$object" ;;
    neonbf16) expect_some '[[:space:]]bfdot' "$object"; expect_some '[[:space:]]bfmmla' "$object" ;;
    *) echo "$isa: nothing is known about this instruction set"; failed=1 ;;
  esac
done
shift
others=$(mktemp)
trap 'rm -f "$others"' EXIT
"$cxx" -shared -o "$others" "$@"  # linked: objdump takes minutes over the thousands of sections of a debug build's objects
expect_none "$beyond_baseline" "$others"
exit $failed

#!/bin/sh
# The objects of kernels.cc, one per instruction set, and the rest of the library, by nm and objdump:
# - kernel objects define no weak function but in their own namespace: the linker would keep one copy for all, maybe the one
#   with AVX-512;
# - an instruction set's registers and instructions occur in its own object, and in those that go beyond it, only;
# - a function that keeps vectors of 32 or 64 bytes on the stack, and moves them as aligned ones, has aligned its frame:
#   callers align it to 16. GCC forgot this for Windows (its bug 54412); GCC 14 moves them as unaligned ones there.
# Usage: kernel_objects.sh CXX NM OBJDUMP ISA=OBJECT... -- OTHERS...
set -eu
cxx=$1 nm=$2 objdump=$3
shift 3
failed=0
others=$(mktemp) listed=$(mktemp)
trap 'rm -f "$others" "$listed"' EXIT

expect_unshared() {  # ISA OBJECT
  # An object for Windows has no weak functions, but sections of which the linker keeps one.
  shared=$({ "$nm" -C "$2" | grep ' W '; "$objdump" -h "$2" | sed -n 's/.* \.text\$\([^ ]*\) .*/\1/p' | c++filt; } |
    grep -v -e "pissa::cpu::$1::" -e ' W DW.ref.' || true)
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

expect_aligned_frames() {  # OBJECT
  "$objdump" -d --no-show-raw-insn "$1" | awk '
    /^[0-9a-f]+ <.*>:$/ { name = $2; sub(/\.cold[.0-9]*>:$/, ">:", name) }  # GCC puts a part of a function elsewhere
    /vmov(ap|dqa|ntp|ntdq)/ && /%[yz]mm/ && /\(%r[sb]p[,)]/ {
      bytes = /%zmm/ ? 64 : 32
      if (bytes > needed[name]) needed[name] = bytes
    }
    /and +\$0xf+e0,%rsp/ { frame[name] = 32 }
    /and +\$0xf+[c80]0,%rsp/ { frame[name] = 64 }
    END { for (name in needed) if (needed[name] > frame[name] + 0) print needed[name], name }' >"$listed"
  [ -s "$listed" ] || return 0
  echo "$1 has functions that move vectors of so many bytes to or from the stack, and do not align it to as many:"
  cat "$listed"
  failed=1
}

beyond_baseline='%[yzt]mm\|[[:space:]]\(sdot\|bf\(dot\|cvt\|mmla\)\)'  # of x86-64 and of AArch64
while [ "$1" != -- ]; do
  isa=${1%%=*} object=${1#*=}
  shift
  expect_unshared "$isa" "$object"
  expect_aligned_frames "$object"
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
case $1 in
  *.obj) ;;  # for Windows, where a library may leave no name undefined
  *)  # linked: objdump takes minutes over the thousands of sections of a debug build's objects
    "$cxx" -shared -o "$others" "$@"
    set -- "$others" ;;
esac
for object; do expect_none "$beyond_baseline" "$object"; done
exit $failed

#!/bin/sh
# wine.sh PROGRAM ARGUMENT...: runs a Windows program under Wine, in the prefix build/windows/prefix, with what torch needs
# there. A real Windows needs none of these variables.
prefix=$(cd "$(dirname "$0")/../.." && pwd)/build/windows/prefix
export WINEPREFIX="$prefix" WINEARCH=win64 WINEDEBUG=-all XDG_RUNTIME_DIR="$prefix"
export WINEDLLOVERRIDES='ucrtbase=n;mscoree,mshtml='  # our ucrtbase.dll (prefix.py), and no offers to install .NET or Gecko
export KMP_AFFINITY=disabled  # OpenMP asks for the processors of NUMA nodes, which Wine does not know
# Linux gives AMX's registers to processes that ask for them. A Windows program does not ask Linux, but oneDNN would use them.
export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
exec wine "$@"

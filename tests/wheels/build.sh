#!/bin/sh
# The sdist, and for each PYTHON a wheel for this machine's architecture and one for AArch64, both with the CUDA library,
# into FOLDER/dist, inspected. FOLDER/cuda-ARCHITECTURE has the CUDA to compile them with.
# PACKAGES has torch, of which headers are wanted; TOOLS is an environment with auditwheel, twine and others (mk/wheels.mk).
# Usage: build.sh FOLDER PACKAGES TOOLS PYTHON...
set -eu
folder=$1 packages=$2 tools=$3
shift 3
repository=$PWD
PATH=$tools/bin:$PATH
mkdir -p "$folder/dist"
rm -rf "$folder"/dist/*

# What a build needs, for each Python: not all of it is the same for all. torch comes from PACKAGES, after all else.
environment() {  # PYTHON VERSION
  [ -e "$folder/venv-$2/ready" ] && return
  "$1" -m venv --clear "$folder/venv-$2"
  "$folder/venv-$2/bin/python" -m pip install -q 'scikit-build-core>=1.0' 'pybind11>=3.0' 'cmeel-eigen>=3.4' 'cmake>=3.24' ninja
  echo "$packages" >"$("$folder/venv-$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
  touch "$folder/venv-$2/ready"
}

# All Pythons share a build folder of their architecture: only the module itself differs between them.
wheel() {  # VERSION ARCHITECTURE OPTION...
  python=$folder/venv-$1/bin/python architecture=$2
  shift 2
  rm -rf "$folder/raw" "$folder/repaired"
  PATH=$folder/${python%/python}:$PATH
  "$python" -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$folder/raw" --config-settings=build-dir="$folder/$architecture" \
    --config-settings=cmake.define.PISSA_CUDA=ON --config-settings=cmake.define.PISSA_CUDA_ARCHITECTURES=all \
    --config-settings=cmake.define.PISSA_CUDA_ROOT="$folder/cuda-$architecture/nvidia/cu13" \
    --config-settings=cmake.define.PISSA_MANYLINUX=ON "$@" "$repository"
  inspect "$architecture" "$folder"/raw/*.whl
  sh "$repository/tests/cuda_wheel.sh" "$folder"/raw/*.whl "$folder/cuda-$architecture/nvidia/cu13/bin/cuobjdump"
  # The tag is that of the oldest system which has all that is needed: of glibc 2.34, for the CUDA runtime takes its threads
  # from where this machine's glibc keeps them. torch's and CUDA's libraries are there already, for pissa imports torch first.
  auditwheel repair --only-plat --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' -w "$folder/repaired" "$folder"/raw/*.whl
  case $(ls "$folder/repaired") in
    *-manylinux_2_[12][0-9]_"$architecture".whl | *-manylinux_2_3[0-4]_"$architecture".whl) mv "$folder"/repaired/*.whl "$folder/dist" ;;
    *) ls "$folder/repaired" >&2; echo "needs more than manylinux_2_34 has; auditwheel show $folder/raw/*.whl says what" >&2; exit 1 ;;
  esac
}

# Of a wheel's module: its architecture, what it links, and that it looks in no folder of ours. That torch's library is among
# what it links matters: where it was cross-compiled there was no such library.
inspect() {  # ARCHITECTURE WHEEL
  cmake -E chdir "$folder/raw" cmake -E tar xf "$2"
  readelf -hd "$folder"/raw/pissa/_C*.so >"$folder/raw/module"
  got=$(sed -n -e 's/^ *Machine: *//p' -e 's/.*(NEEDED).*\[\(.*\)\]/\1/p' -e 's/.*(\(R.*PATH\)).*/\1/p' "$folder/raw/module" |
    sed 's/.*X86-64/x86_64/; s/AArch64/aarch64/; /^ld-linux/d' | LC_ALL=C sort | tr '\n' ' ')
  needed=$(printf '%s\n' "$1" libtorch_cpu.so libstdc++.so.6 libm.so.6 libgcc_s.so.1 libc.so.6 | LC_ALL=C sort | tr '\n' ' ')
  [ "$got" = "$needed" ] || { printf '%s\n  needed: %s\n  got:    %s\n' "$2" "$needed" "$got" >&2; exit 1; }
}

for interpreter; do
  version=$("$interpreter" -c 'import sys; print("3.%d" % sys.version_info[1])')
  environment "$interpreter" "$version"
  # Python's headers are those of this machine: the same on all Linux but for pyconfig.h, in which the sizes of types are the same
  # on both. Debian's is in a folder with the architecture's name, beside that of the others.
  include=$("$interpreter" -c 'import os, sysconfig; print(os.path.dirname(sysconfig.get_path("include")))')
  mkdir -p "$folder/headers"
  for architecture in "$(uname -m)" aarch64; do ln -sfn "$include/$(uname -m)-linux-gnu" "$folder/headers/$architecture-linux-gnu"; done
  export CPLUS_INCLUDE_PATH="$folder/headers"
  wheel "$version" "$(uname -m)"
  suffix=.cpython-3${version#3.}-aarch64-linux-gnu.so
  (
    export _PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX="$suffix"
    wheel "$version" aarch64 --config-settings=cmake.define.PYTHON_MODULE_EXTENSION="$suffix" \
      --config-settings=cmake.define.CMAKE_TOOLCHAIN_FILE="$repository/cpp/cmake/aarch64-linux-gnu.cmake"
  )
done

"$tools/bin/python" -m build -q --sdist --no-isolation --skip-dependency-check -o "$folder/dist" "$repository"
# By its declared requirements alone, as `pip install` does: in an environment that pip makes for the build.
"$tools/bin/python" -m pip wheel -q --no-deps -w "$folder/from-sdist" --config-settings=cmake.define.PISSA_CUDA=OFF "$folder"/dist/*.tar.gz
twine check --strict "$folder"/dist/*
check-wheel-contents "$folder"/dist/*.whl
ls -l "$folder/dist"

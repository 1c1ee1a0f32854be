#!/usr/bin/env bash
# prepare.sh OUT_DIR [PYTHON_VERSION]: collects in OUT_DIR what bench/gpu.sh --prepared OUT_DIR needs on a machine with a
# GPU, but without package indices. PYTHON_VERSION is that machine's, 3.12 unless given. The folder stays below 60 MB: bitsandbytes comes
# without its libraries for other versions of CUDA, torch and transformers do not come. Run it where pip and apt-get
# reach their indices.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUT_DIR [PYTHON_VERSION]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$1 version=${2:-3.12}
python=${PYTHON:-python3}
limit_mb=60
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
export PIP_DISABLE_PIP_VERSION_CHECK=1

download() {  # FOLDER PACKAGE...: wheels for the other machine, without what they depend on
  local to=$1
  shift
  "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --dest "$to" "$@"
}

# To build; to test; the peer. A package and its pure dependencies each.
rm -rf "$out/wheels" "$out/site" "$out/googletest" "$out/benchmark"
download "$out/wheels" 'pybind11>=3.0' 'scikit-build-core>=1.0' pathspec packaging 'cmeel-eigen>=3.4' cmeel
download "$out/wheels" 'pytest>=8' iniconfig pluggy pygments 'hypothesis>=6.100' sortedcontainers
download "$out/wheels" 'peft>=0.21.2' tqdm psutil 'accelerate>=1.4' 'xxhash>=3.0'

# bitsandbytes: its Python files and one library, as files to put on the path.
download "$work" 'bitsandbytes>=0.50'
"$python" - "$work" "$out/site" <<'END'
import sys, zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("bitsandbytes-*.whl")
with zipfile.ZipFile(wheel) as archive:
    kept = [n for n in archive.namelist() if not n.endswith((".so", ".dll")) or n.endswith("libbitsandbytes_cuda130.so")]
    assert any(n.endswith(".so") for n in kept), f"{wheel.name} has no library for CUDA 13.0"
    archive.extractall(sys.argv[2], kept)
END

# Sources: GoogleTest out of Debian's binary package, Google Benchmark out of its source package.
sh "$root/tests/cpp/support/fetch_googletest.sh" "${GOOGLETEST_DIR:-/usr/src/googletest}" "$work/googletest"
cp -rL "$work/googletest" "$out/googletest"
if [ -n "${BENCHMARK_DIR:-}" ]; then
  cp -rL "$BENCHMARK_DIR" "$out/benchmark"
else
  # apt's own lists and sources, privately, with the sources of the distribution's packages as well
  mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$work/apt/parts" "$work/source"
  [ ! -f /etc/apt/sources.list ] || sed -n 's/^deb /deb-src /p' /etc/apt/sources.list >"$work/apt/parts/main.list"
  for file in /etc/apt/sources.list.d/{debian,ubuntu}.sources; do
    [ ! -f "$file" ] || sed 's/^Types:.*/Types: deb-src/' "$file" >"$work/apt/parts/$(basename "$file")"
  done
  apt="-q -o Dir::State::lists=$work/apt/lists -o Dir::Cache=$work/apt/cache -o Dir::Etc::sourcelist=/dev/null"
  apt="$apt -o Dir::Etc::sourceparts=$work/apt/parts -o APT::Sandbox::User=root"
  # shellcheck disable=SC2086
  (cd "$work/source" && apt-get $apt update && apt-get $apt source --download-only benchmark) >"$work/log" 2>&1 ||
    { cat "$work/log" >&2; echo "Google Benchmark's sources could not be fetched: give BENCHMARK_DIR" >&2; exit 1; }
  mkdir "$out/benchmark"
  tar xf "$work"/source/benchmark_*.orig.tar.* -C "$out/benchmark" --strip-components 1
fi
[ -f "$out/benchmark/CMakeLists.txt" ] || { echo "no CMakeLists.txt in $out/benchmark" >&2; exit 1; }

size=$(du -sm "$out" | cut -f1)
find "$out" -maxdepth 2 -mindepth 1 -printf '%P\n' | grep -E '^(wheels/|[^/]*$)' | sort
echo "$out: $size MB, for Python $version"
[ "$size" -lt "$limit_mb" ] || { echo "that is more than the $limit_mb MB it may be" >&2; exit 1; }

#!/usr/bin/env bash
# gpu.sh [PREPARED_DIR]: builds for the GPU of this machine, tests there (C++, compute-sanitizer, Python), measures, in at
# most 9 minutes. PREPARED_DIR (or the variable of that name) is what bench/gpu_prepare.sh collected, for a machine without
# package indices; what is installed already is used as it is.
#
# Every stage has its own time and a log in build/gpu/logs; one that fails does not keep the others from running, and is
# named at the end, as are those for which no time was left. Exit status: 0 if every stage passed. Measurements:
# bench/results/<card>.json, written row by row. OUT, if set, is a folder that receives the measurements and logs.
# LIMIT_S: seconds for all of it (520).
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
prepared=${1:-${PREPARED_DIR:-}}
python=${PYTHON:-python3}
build=$root/build/gpu
logs=$build/logs
begin=$(date +%s)
limit=${LIMIT_S:-520}

# ---- The card --------------------------------------------------------------------------------------------------------

if ! command -v nvidia-smi >/dev/null || ! card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) ||
  [ -z "$card" ]; then
  echo "no GPU: nvidia-smi names none on this machine" >&2
  exit 1
fi
if [ -n "$prepared" ] && ! prepared=$(cd "$prepared" 2>/dev/null && pwd); then
  echo "no folder $prepared: make it with bench/gpu_prepare.sh" >&2
  exit 1
fi
rm -rf "$build"
mkdir -p "$logs" "$build/site" "$root/bench/results"
touch "$build/begin"
name=$(echo "$card" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\n' '_' | sed 's/_*$//')
results=$root/bench/results/$name.json
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d ' .')
jobs=$(nproc)
for cuda in "${CUDA_HOME:-/nowhere}" /usr/local/cuda; do
  [ ! -x "$cuda/bin/nvcc" ] || { export PATH="$cuda/bin:$PATH"; break; }
done
[ -x "$cuda/bin/nvcc" ] || cuda=
echo "card: $(nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader | head -n 1)"
echo "nvcc: $(nvcc --version 2>/dev/null | sed -n 's/.*release //p'), cmake: $(cmake --version 2>/dev/null | head -n 1), cores: $jobs"

# ---- Stages ----------------------------------------------------------------------------------------------------------

failed=() skipped=()

copy_out() {
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT/logs"
  cp -f "$logs"/* "$OUT/logs/" 2>/dev/null
  [ ! -f "$results" ] || [ "$results" -ot "$build/begin" ] || cp -f "$results" "$OUT/"
  return 0
}
trap copy_out EXIT

stage() {  # NAME SECONDS FUNCTION: runs it with its output in a log; shows the end of the log when it fails
  local name=$1 seconds=$2 start status left
  start=$(date +%s)
  left=$((limit - (start - begin)))
  if [ "$left" -lt 10 ]; then
    echo "$name: not run, no time is left"
    skipped+=("$name")
    return 1
  fi
  [ "$seconds" -le "$left" ] || seconds=$left
  export -f "$3"
  timeout -k 10 "$seconds" bash -c "set -u; $3" >"$logs/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    echo "$name: passed in $(($(date +%s) - start)) s"
  else
    failed+=("$name")
    [ $status -lt 124 ] || echo "$name: out of its $seconds s, or killed (status $status)"
    echo "$name: FAILED (status $status) after $(($(date +%s) - start)) s; the end of $logs/$name.log:"
    tail -n 40 "$logs/$name.log" | cut -c 1-300 | sed 's/^/    /'
  fi
  copy_out
  return $status
}

needs() {  # NAME WHAT...: whether the stages before that it needs have passed
  local name=$1 needed one
  shift
  for needed in "$@"; do
    for one in ${failed[@]+"${failed[@]}"} ${skipped[@]+"${skipped[@]}"}; do
      [ "$one" != "$needed" ] || { echo "$name: not run, for lack of $needed"; skipped+=("$name"); return 1; }
    done
  done
}

export root prepared python build logs results capability jobs cuda
export PYTHONPATH="$build/site${PYTHONPATH:+:$PYTHONPATH}" PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CMAKE_GENERATOR=Ninja

packages() {  # into build/gpu/site, which comes before what is installed: whatever is missing or older than prepared
  if [ -n "$prepared" ]; then
    "$python" - "$build/site" "$prepared"/wheels/*.whl <<'END' || return 1
import importlib.metadata, sys, zipfile
from pathlib import Path

def number(text):
    return [int(part) if part.isdigit() else 0 for part in text.split(".")[:3]]

for wheel in sys.argv[2:]:
    name, version = Path(wheel).name.split("-")[:2]
    try:
        if number(importlib.metadata.version(name)) >= number(version):
            continue
    except importlib.metadata.PackageNotFoundError:
        pass
    print("from the prepared folder:", name, version)
    zipfile.ZipFile(wheel).extractall(sys.argv[1])
END
    "$python" -c 'import bitsandbytes' 2>/dev/null || cp -r "$prepared"/site/. "$build/site/"
  fi
  "$python" - <<'END'
import importlib, importlib.metadata, sys
import torch

print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name())
missing = []
for package in ("pybind11", "numpy", "safetensors", "transformers", "accelerate", "peft", "tqdm", "pytest", "hypothesis", "bitsandbytes"):
    try:
        importlib.import_module(package)
        print(package, importlib.metadata.version(package))
    except Exception as error:
        missing.append(f"{package} ({type(error).__name__}: {error})")
sys.exit("missing: " + ", ".join(missing) if missing else 0)
END
}

configure() {
  set -- -DPISSA_CUDA=ON "-DPISSA_CUDA_ARCHITECTURES=$capability-real" -DCMAKE_BUILD_TYPE=Release \
    "-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')" \
    "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" -DPISSA_BUILD_TESTS=ON
  [ ! -d "$prepared/googletest" ] || set -- "$@" "-DPISSA_GOOGLETEST_DIR=$prepared/googletest"
  [ -d "$prepared/googletest" ] || [ ! -d /usr/src/googletest ] || set -- "$@" -DPISSA_GOOGLETEST_DIR=/usr/src/googletest
  if [ -d "$prepared/benchmark" ]; then
    set -- "$@" -DPISSA_BUILD_BENCH=ON "-DPISSA_BENCHMARK_DIR=$prepared/benchmark"
  elif [ -f /usr/include/benchmark/benchmark.h ]; then
    set -- "$@" -DPISSA_BUILD_BENCH=ON
  else
    echo "no Google Benchmark: the C++ benchmarks are left out"
  fi
  cmake -S "$root" -B "$build/cmake" "$@"
}

build_all() {  # what can be built is, whatever else fails
  local targets
  targets=$(cmake --build "$build/cmake" --target help | sed -n 's/^\(cuda_[a-z0-9_]*_test\): .*/\1/p' |
    grep -v '^cuda_sim' | sort -u)
  [ -n "$targets" ] || { echo "the build has no tests cuda_*_test"; return 1; }
  [ ! -f "$build/cmake/bench/cmake_install.cmake" ] || targets="$targets bench_linear bench_nf4 bench_svd"
  # shellcheck disable=SC2086
  cmake --build "$build/cmake" -j "$jobs" --target _C pissa_cuda13 $targets -- -k 0
}

module() {
  cmake --install "$build/cmake" --component python --prefix "$build/site" || return 1
  (cd "$root/python" && find pissa -name '*.py' -not -path '*/__pycache__/*' -exec cp --parents {} "$build/site/" \;)
  # From another folder, so that it is this build that is imported; its libraries as torch has them.
  cd / && "$python" -c '
import pissa, torch
from pissa import _load, ops
assert _load.cuda_problem is None, _load.cuda_problem
print(pissa.build_info(), *pissa.__path__)
w = torch.randn(256, 128, device="cuda")
u, s, v = ops.svd_lowrank(w, 8)
assert torch.allclose(ops.dequantize(ops.quantize(w)), w, atol=0.5)
'
}

cpp_tests() {  # by the ctest that came with the cmake that made the build
  "$(dirname "$(command -v cmake)")/ctest" --test-dir "$build/cmake" -L '^cuda$' -j 8 --no-tests=error --output-on-failure
}

sanitizer() {  # memcheck and racecheck on cases of few elements, several at a time; out of time is no mistake found
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer"; return 1; }
  local tests=$build/cmake/tests/cpp pids=() status=0 pid tool name filter
  # A line each: the test, and which of its cases (gtest_filter).
  while read -r name filter; do
    [ -x "$tests/cuda_${name}_test" ] || { echo "no cuda_${name}_test"; status=1; continue; }
    for tool in memcheck racecheck; do
      (
        log=$logs/sanitizer-$tool-$name.log
        timeout -k 5 20 compute-sanitizer --tool "$tool" --error-exitcode 99 \
          "$tests/cuda_${name}_test" "--gtest_filter=$filter" >"$log" 2>&1
        code=$?
        ran=$(grep -c '\[ RUN ' "$log")
        echo "$tool $name: status $code, $ran cases begun, $(grep -c 'ERROR SUMMARY: 0\|RACECHECK SUMMARY: 0' "$log") clean summaries"
        [ "$code" -eq 124 ] && { grep -q '========= \(Error\|Invalid\|Race\)' "$log" && exit 1; echo "    cut off"; exit 0; }
        [ "$code" -eq 0 ] && [ "$ran" -gt 0 ] || { tail -n 30 "$log"; exit 1; }
      ) &
      pids+=($!)
      while [ "$(jobs -rp | wc -l)" -ge 8 ]; do sleep 0.2; done
    done
  done <<'END'
elementwise *
philox *
nested_scales *
nf4_golden *
gemm_nf4 *
weight_gemm *FewRows*
gemm *WithoutTerms*:*AddsToItsOutput*:*FewerColumns*:*InnerDimension*
gram *EigenvaluesAre*
orthonormalize *LeavesOrthonormal*:*AgainAfter*
linear *ZeroTokens*:*ZeroDeltas*
add_low_rank *
svd *AWeightInNf4*:*TheSeedMatters*
END
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return $status
}

# Warnings are no errors here: the versions of torch and transformers are this machine's.
export test_options="-q -p no:cacheprovider -W default"

python_tests() {  # the files that know --device, side by side
  local file pids=() status=0
  cd "$root" || return 1
  for file in ops_linear ops_nf4 ops_svd layer model; do
    "$python" -m pytest $test_options --device cuda -m "not slow and not gpu" --maxfail 30 \
      "$(echo tests/python/*/test_$file.py)" >"$logs/python-$file.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  for file in ops_linear ops_nf4 ops_svd layer model; do
    echo "$file: $(tail -n 1 "$logs/python-$file.log")"
    grep -h '^\(FAILED\|ERROR\)' "$logs/python-$file.log" | head -n 12
  done
  return $status
}

python_gpu_tests() { cd "$root" && "$python" -m pytest $test_options -m gpu tests/python/ops/test_gpu.py; }

measure() { cd "$root" && "$python" -u bench/gpu.py --seconds 130 --json "$results"; }

measure_cpp() {
  local bench
  for bench in bench_nf4 bench_linear bench_svd; do
    "$build/cmake/bench/$bench" --backend=cuda --benchmark_min_time=0.05s --benchmark_repetitions=3 \
      --benchmark_report_aggregates_only=true --benchmark_out="$logs/$bench.json" --benchmark_out_format=json || return 1
  done
}
# The most important first, for what is left when time is over is not run.
stage packages 60 packages
# CUDA's libraries as torch has them; what torch lacks, the toolkit has.
torch_libraries=$("$python" -c 'import sys; print(":".join(p + "/nvidia/cu13/lib" for p in sys.path if p))' 2>/dev/null)
export LD_LIBRARY_PATH="$torch_libraries${cuda:+:$cuda/lib64}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
stage configure 60 configure
needs build configure && stage build 210 build_all
needs module configure && stage module 40 module
needs measure module && stage measure 200 measure
needs cpp-tests configure && stage cpp-tests 100 cpp_tests
needs gpu-tests module && stage gpu-tests 90 python_gpu_tests
needs python-tests module && stage python-tests 90 python_tests
needs sanitizer configure && stage sanitizer 90 sanitizer
if [ -x "$build/cmake/bench/bench_nf4" ]; then
  stage measure-cpp 60 measure_cpp
else
  echo "measure-cpp: not run, for there are no C++ benchmarks; see logs/configure.log"
  skipped+=(measure-cpp)
fi

# ---- What came of it -------------------------------------------------------------------------------------------------

grep -h -A 1 '^Benchmark\|_median' "$logs/measure-cpp.log" 2>/dev/null | grep '_median\|^Benchmark' | cut -c 1-160
for log in cpp-tests gpu-tests python-tests sanitizer; do
  [ ! -f "$logs/$log.log" ] || { echo "$log:"; grep -h 'tests passed\|passed\|failed\|clean' "$logs/$log.log" | tail -n 24 | cut -c 1-160; }
done
echo "took $(($(date +%s) - begin)) s"
[ ! "$results" -nt "$build/begin" ] || echo "measurements: $results"
if [ -f "$logs/measure.log" ]; then  # the table where it ended, else the rows that were measured
  echo
  if grep -q '^| work |' "$logs/measure.log"; then sed -n '/^| work |/,$p' "$logs/measure.log"
  else grep '^| ' "$logs/measure.log"; fi
fi
if [ ${#failed[@]} -gt 0 ] || [ ${#skipped[@]} -gt 0 ]; then
  echo
  echo "FAILED: ${failed[*]:-none}; not run: ${skipped[*]:-none}"
  exit 1
fi

#!/usr/bin/env bash
# Builds for the GPU of this machine, tests there (C++, Python, compute-sanitizer) and measures.
#
#   bash bench/gpu.sh [STAGE...] [--prepared DIR]    # of: build correctness start linear nf4 decode models sanitizer
#                                                    # profile; all unless given
#   bash bench/gpu.sh linear --rows "M = 2048"       # after a change: builds what has changed, measures these rows
#   bash bench/gpu.sh --rehearse                     # with the simulated GPU of the build CMAKE, and the rows on the CPU
#
# A call ends within --seconds (520); the next one goes on: what has passed with these sources on this card is not
# repeated unless its stage is named, nor is a row measured again. A part that fails keeps no other from running. DIR is
# what bench/gpu/prepare.sh collected, for a machine without package indices. CARD.json (rows), CARD_summary.txt and
# CARD_logs.tar.gz are written after each part, into bench/results or the folder OUT; the summary's first line says what
# broke. Exit status 0: all that was asked has passed, or cannot run here (for lack of GoogleTest, say).
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.." || exit
export python=${PYTHON:-python3} root=$PWD prepared="" device=cuda kind=cuda quick="" again="" build="" site cmake logs
seconds=520 rehearsal="" stages=() rows=()
all=(build correctness start linear nf4 decode models sanitizer profile)
while [ $# -gt 0 ]; do
  case $1 in
    --prepared) prepared=$(cd "$2" && pwd) || exit 2; shift ;;
    --rows) rows+=("--rows=$2"); shift ;;
    --seconds) seconds=$2; shift ;;
    --build) build=$2; shift ;;
    --rehearse) rehearsal=1 device=cpu kind=cuda_sim quick="--quick --pairs 1" ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
    *) [[ " ${all[*]} " == *" $1 "* ]] || { echo "got $1; allowed: ${all[*]}, and the options of --help" >&2; exit 2; }
       stages+=("$1") ;;
  esac
  shift
done
[ ${#stages[@]} = 0 ] || again=--again

query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -1; }
export -f query
card=${rehearsal:+rehearsal}
card=${card:-$(query name)}
[ -n "$card" ] || { echo "no GPU: nvidia-smi names none on this machine" >&2; exit 1; }
card=$(sed 's/[^a-z0-9]\+/_/g;s/^_//;s/_$//' <<<"${card,,}")
if [ -n "$rehearsal" ]; then build=${build:-build/rehearsal}; else build=${build:-build/gpu}; fi
mkdir -p "$build" && build=$(cd "$build" && pwd) || exit
cmake=$build/cmake site=$build/site logs=$build/logs results=${OUT:-bench/results}
[ -z "$rehearsal" ] || cmake=${CMAKE:-$root/build/release} results=${OUT:-$build/results}
sources="CMakeLists.txt pyproject.toml cpp python tests bench/cpp bench/compare bench/gpu bench/gpu.sh"
# shellcheck disable=SC2086
tree=$(find $sources -type f ! -name '*.so' ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
export tree=${tree:0:12} run=$EPOCHREALTIME log=$build/rows.jsonl
export state=$build/$card-$tree # a file for each part: how it ended
mkdir -p "$state" "$site" "$results"
[ -n "$(ls "$state")" ] || rm -rf "$logs"
mkdir -p "$logs"
for path in "${CUDA_HOME:-}" /usr/local/cuda; do
  [ -x "$path/bin/nvcc" ] || continue
  export PATH=$path/bin:$PATH LD_LIBRARY_PATH=$path/lib64:${LD_LIBRARY_PATH:-}
  break
done
[ -n "$rehearsal" ] || export PYTHONPATH=$site:${PYTHONPATH:-}
for path in $("$python" -c 'import sys; print(*filter(None, sys.path))'); do # torch's CUDA before the toolkit's
  [ ! -d "$path/nvidia/cu13/lib" ] || export LD_LIBRARY_PATH=$path/nvidia/cu13/lib:${LD_LIBRARY_PATH:-}
done
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 CMAKE_GENERATOR=Ninja
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
facts=$([ -n "$rehearsal" ] && echo "none, a rehearsal" || query name,driver_version,memory.total,compute_cap)
machine="card: $facts
nvcc: $(nvcc --version 2>/dev/null | sed -n 's/.*release //p'), $(cmake --version 2>/dev/null | head -1)
cores: $(nproc)"

# ---- What the parts do: status 77 is that it cannot run here, 75 that it has not come to its end ---------------------

left_out() { echo "$1" && return 77; }
sources_of() { # googletest|benchmark: a folder of its sources, if there is one
  local variable=${1^^}_DIR
  for path in "${!variable:-}" "$prepared/$1" "/usr/src/$1"; do
    [ ! -e "$path/CMakeLists.txt" ] || { echo "$path"; return; }
  done
}
has() { [ -n "$(sources_of "$1")" ] || [ -e "/usr/include/$2" ]; }
on() { "$@" && echo ON || echo OFF; }
lacks() { echo "error: no $1: $python -m pip install $2, or bench/gpu/prepare.sh FOLDER elsewhere" && return 1; }
configure() {
  for tool in cmake ninja; do command -v $tool || lacks $tool $tool || return; done
  [ -z "$prepared" ] || "$python" -m bench.gpu.packages "$prepared" "$site"
  pybind=$("$python" -m pybind11 --cmakedir) || lacks pybind11 "pybind11 cmeel-eigen" || return
  cmake -S . -B "$cmake" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$pybind" -DPISSA_CUDA=ON -DPISSA_CUDA_ARCHITECTURES="$(query compute_cap | tr -d .)-real" \
    -DPISSA_BUILD_TESTS="$(on has googletest gtest/gtest.h)" -DPISSA_GOOGLETEST_DIR="$(sources_of googletest)" \
    -DPISSA_BUILD_BENCH="$(on has benchmark benchmark/benchmark.h)" -DPISSA_BENCHMARK_DIR="$(sources_of benchmark)"
}
make_targets() { cmake --build "$cmake" -j "$(nproc)" --target "$@"; }
compile() { make_targets _C pissa_cuda13; }
export SMOKE='
import pissa, torch
from pissa import ops
from pissa.ops import _load
print(pissa.build_info(), *pissa.__path__)
assert not _load.cuda_problem, _load.cuda_problem
weight = torch.randn(256, 128, device="cuda")
ops.svd_lowrank(weight, 8)
error = (ops.dequantize(ops.quantize(weight)) - weight).abs().max()
assert error < 0.2 * weight.abs().max(), f"an element in nf4 is off by {error}" # half of the widest gap is 0.152'
module() { # puts libraries and Python files together as `pissa` in the folder `site`, and tries them
  rm -rf "$site/pissa"
  cmake --install "$cmake" --component python --prefix "$site" &&
    (cd python && find pissa -name "*.py" -exec cp --parents {} "$site" \;) && "$python" -c "$SMOKE"
}
compile_tests() { # a build that fails leaves no older one to be run
  has googletest gtest/gtest.h || left_out "C++ tests: no GoogleTest (GOOGLETEST_DIR, libgtest-dev)" || return
  rm -f "$cmake/tests/cpp/cuda_test"
  make_targets cuda_test
}
tests_are_built() {
  [ "$device" = cuda ] || return 0
  has googletest gtest/gtest.h || left_out "C++ tests: no GoogleTest" || return
  [ -e "$cmake/tests/cpp/cuda_test" ] || { echo "for lack of compile-tests" && return 75; }
}
cpp_tests() {
  tests_are_built || return
  "$(dirname "$(command -v cmake)")/ctest" --test-dir "$cmake" -L "^$kind\$" -j 8 --no-tests=error --output-on-failure
}
# Warnings are no errors here: the versions of torch and transformers are this machine's.
py() { "$python" -m pytest -q -p no:cacheprovider -W default "$@"; }
needs() { "$python" -c "import $2" || left_out "$1: no ${2//,/, }"; }
file_of() { find tests/python -name "test_$1.py"; }
gpu_tests() { # what only a GPU shows; the rehearsal collects them
  needs "pytest -m gpu" pytest,peft,transformers,xxhash || return
  py -m gpu $([ "$device" = cuda ] || echo --collect-only) "$(file_of gpu)"
}
device_tests() { # the files that take --device, side by side; the rehearsal a small one, for on the CPU others run them
  needs "pytest --device" pytest,hypothesis || return
  local names="ops_linear ops_nf4 ops_int8 ops_svd alternate" pids=() status=0
  "$python" -c "import peft, transformers, xxhash" && names+=" layer model"
  [ "$device" = cuda ] || names=ops_int8
  for name in $names; do
    py --device "$device" -m "not slow and not gpu" --maxfail 30 "$(file_of "$name")" >"$logs/pytest-$name.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  for name in $names; do
    grep -E '^(FAILED|ERROR)' "$logs/pytest-$name.log"
    echo "$name: $(tail -1 "$logs/pytest-$name.log")"
  done
  return $status
}
export ROUTES='
from pissa.ops import _load
words = _load.routes()
assert words.count("good") == 4, f"no times: of this GPU the self-test says: {words}"'
measure() { # STAGE SECONDS ROWS...: in a process of its own, and in another one what an error of the GPU has left
  local before status=3
  [ "$device" != cuda ] || "$python" -c "$ROUTES" || return
  while [ $status = 3 ] || [ $status -gt 128 ]; do
    before=$(wc -c <"$log")
    # shellcheck disable=SC2086
    "$python" -u -m bench.gpu.measure "$1" --device $device $quick --log "$log" --tree "$tree" --run "$run" $again \
      --seconds "$2" "${@:3}"
    status=$?
    [ "$(wc -c <"$log")" -gt "$before" ] || break
  done
  return $status
}
# Tests for the sanitizer and their cases, of few elements. Only our kernels are watched, which saves most of the time.
export SANITIZED='Elementwise=* FillSigns=* NestedScales=* Nf4Golden=* GemmQuantized=* WeightGemm=*FewRows*
FewRows=*EveryEdge* Gemm=*WithoutTerms*:*AddsToItsOutput*:*FewerColumns*:*InnerDimension* Gram=*EigenvaluesAre*
Eigh=*EachMatrixOfAStack* Orthonormalize=*LeavesOrthonormal*:*AgainAfter* Linear=*ZeroTokens*:*ZeroDeltas*
AddLowRank=* Svd=*AWeightInNf4*:*TheSeedMatters*'
sanitize() { # TOOL: six tests at a time; one that was cut off or ran no case has not passed
  tests_are_built || return
  command -v compute-sanitizer || left_out "the sanitizer: no compute-sanitizer" || return
  xargs -n 1 -P 6 bash -c 'one "$@"' _ "$1" <<<"$SANITIZED" 2>&1 | sort
  [ "${PIPESTATUS[0]}" = 0 ]
}
one() { # TOOL NAME=CASES of the suite NAMETest
  local name=${2%%=*} cases=${2#*=} out=$logs/$1-${2%%=*}.log
  timeout 40 compute-sanitizer --tool "$1" --error-exitcode 99 --kernel-regex kns=pissa "$cmake/tests/cpp/cuda_test" \
    --gtest_filter="*/${name}Test.${cases//:/:*\/${name}Test.}" >"$out" 2>&1
  local status=$? summary
  summary=$(grep -oE '(ERROR|RACECHECK) SUMMARY: .*' "$out" | tail -1)
  if [ $status = 0 ] && grep -q '\[ RUN ' "$out" && [[ $summary =~ SUMMARY:\ 0\  ]]; then
    echo "$1 $name: clean" && return
  fi
  echo "error: $1 $name: ${summary:-no summary}, status $status, $(grep -c '\[ RUN ' "$out") cases begun"
  return 1
}
kernels() { "$python" -u -m bench.gpu.profiling --device $device ${quick:+--quick}; }
compile_benchmarks() {
  has benchmark benchmark/benchmark.h || left_out "C++ benchmarks: no Google Benchmark (BENCHMARK_DIR)" || return
  make_targets bench_nf4 bench_linear bench_svd
}
cpp_benchmarks() {
  for name in nf4 linear svd; do
    "$cmake/bench/cpp/bench_$name" --backend=cuda --benchmark_min_time=0.05s --benchmark_repetitions=3 \
      --benchmark_report_aggregates_only=true || return
  done
}
# shellcheck disable=SC2046
export -f $(declare -F | cut -d' ' -f3)

# ---- Which parts run, and what they leave ----------------------------------------------------------------------------

asked=0 order=()
wants() { [ ${#stages[@]} = 0 ] || [[ " ${stages[*]} " == *" $1 "* ]]; }
ended() { [ -e "$state/$1" ] && [[ $(<"$state/$1") == *": $2"* ]]; }
part() { # STAGE NAME SECONDS NEEDED COMMAND...
  local stage=$1 name=$2 limit=$3 needed=$4 how why="" left=$((seconds - SECONDS)) begin=$SECONDS status
  shift 4
  order+=("$name")
  [ -z "$rehearsal" ] || limit=$((5 * limit)) # on a CPU that others use too
  if [ "$stage" = build ] && { [ "$name" != compile-tests ] || wants correctness || wants sanitizer; }; then
    : # the others need it
  elif ! wants "$stage"; then
    return
  fi
  if ended "$name" passed && ! { [ -n "$again" ] && wants "$stage"; }; then return; fi
  if [ -n "$needed" ] && ended "$needed" "left out"; then
    how="left out" why=$(sed 's/.*: //' "$state/$needed")
  elif [ -n "$needed" ] && ! ended "$needed" passed; then
    how="not run" why="for lack of $needed"
  elif [ $left -lt 10 ]; then
    how="not run" why="no time"
  else
    timeout -k 10 $((left < limit ? left : limit)) bash -uo pipefail -c '"$@"' _ "$@" >"$logs/$name.log" 2>&1 &
    pid=$!
    wait $pid
    status=$? pid=""
    why=$(grep -m 1 -E '(^|[ :])(error|Error)[: ]|CMake Error|^FAILED|\*\*\*Failed' "$logs/$name.log" ||
      tail -1 "$logs/$name.log")
    case $status in
      0) how=passed why="" ;;
      77) how="left out" why=$(tail -1 "$logs/$name.log") ;;
      75) how="not run" why=$(tail -1 "$logs/$name.log") ;;
      124 | 137) how=failed why="out of its $limit s" ;;
      *) how=failed ;;
    esac
    if [ $status = 124 ] && [ $left -lt "$limit" ]; then how="not run" why="cut off, no time"; fi
  fi
  [ "$how" = passed ] || [ "$how" = "left out" ] || asked=1
  echo "$stage, $name: $how, $((SECONDS - begin)) s${why:+: ${why:0:200}}" | tee "$state/$name"
  [ "$how" != failed ] || tail -40 "$logs/$name.log" | cut -c1-300 | sed 's/^/    /'
  leave
}
leave() { # the summary: what broke, the machine, the tests, the rows, the kernels, the end of each part
  local lines failed late missing
  lines=$(for name in "${order[@]}"; do cat "$state/$name" 2>/dev/null; done)
  failed=$(sed -n 's/^\([^,]*, [^:]*\): failed, [^:]*: \(.*\)/\1 (\2)/p' <<<"$lines" | paste -sd ';')
  late=$(sed -n 's/^\([^,]*, [^:]*\): not run.*/\1/p' <<<"$lines" | paste -sd ';')
  missing=$(sed -n 's/^.*: left out, [^:]*: //p' <<<"$lines" | sort -u | paste -sd ';')
  first="${failed:+FAILED: $failed}"
  first="${first:-nothing failed}${late:+; not run: $late}${missing:+; left out: $missing}"
  {
    printf '%s\n\n%s\nsources: %s\n\n' "$first" "$machine" "$tree"
    (cd "$logs" && grep -hE '^[0-9]+% tests passed|^[a-z0-9_]+: .*(passed|failed|error)|(clean|cases begun)$' ./*.log)
    "$python" -m bench.gpu.table "$log" "$results/$card.json" "$tree"
    cat "$logs/kernels.log" 2>/dev/null
    grep -hE '^Benchmark|_median' "$logs/cpp-benchmarks.log" 2>/dev/null | cut -c1-160
    printf '\n%s\n' "$lines"
  } >"$build/summary" && mv "$build/summary" "$results/${card}_summary.txt"
  tar -C "$build" -czf "$build/logs.tar.gz" logs && mv "$build/logs.tar.gz" "$results/${card}_logs.tar.gz"
}
pid=""
trap 'kill ${pid:+$pid} 2>/dev/null; leave; exit 143' TERM INT
touch "$log"
echo "$machine"
if [ -z "$rehearsal" ]; then
  part build configure 60 "" configure
  part build compile 300 configure compile
  part build module 40 compile module
  part build compile-tests 300 compile compile_tests
  built=compile module=module
else
  built="" module=""
fi
part correctness cpp-tests 120 "$built" cpp_tests
part correctness gpu-tests 90 "$module" gpu_tests
part correctness device-tests 120 "$module" device_tests
for limit in start=150 linear=120 nf4=60 decode=90 models=90; do # no row begins in the last third
  stage=${limit%=*} limit=${limit#*=}
  part "$stage" "$stage" "$limit" "$module" measure "$stage" $((limit * ${rehearsal:+5 *} 2 / 3)) "${rows[@]}"
  [ ${#rows[@]} = 0 ] || rm -f "$state/$stage" # not all of its rows
done
if [ -z "$rehearsal" ]; then
  part sanitizer memcheck 100 compile sanitize memcheck
  part sanitizer racecheck 100 compile sanitize racecheck
  part profile compile-benchmarks 60 compile compile_benchmarks
  part profile cpp-benchmarks 60 compile-benchmarks cpp_benchmarks
fi
part profile kernels 90 "$module" kernels
leave
cat "$results/${card}_summary.txt"
echo "took $SECONDS s"
echo "$first"
exit $asked

#!/bin/sh
# bench/gpu.sh without a GPU: the tests on the simulated one, which CMAKE, a build of the C++ tests, has, a file of those
# that take --device, and all rows, small, on the CPU. What builds is in tests/python/bench/test_gpu_script.py.
# Usage: gpu_rehearsal.sh FOLDER PYTHON CMAKE; the Python has pissa and what tests need.
set -eu
[ -e "$3/CTestTestfile.cmake" ] || { echo "needed: $3, built by make test-cpp" >&2; exit 1; }
status=0
CMAKE=$3 PYTHON=$2 OUT=$1/results bash bench/gpu.sh --rehearse --seconds 2400 --build "$1" || status=$?
[ "$(ls "$1/results" | wc -l)" = 3 ] || { ls "$1/results" >&2; echo "needed: three files" >&2; exit 1; }
exit $status

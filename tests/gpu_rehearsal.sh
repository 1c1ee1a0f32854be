#!/bin/sh
# bench/gpu.sh as it will run on a machine with a GPU, as far as that goes without: the stages build, correctness and start,
# with the simulated GPU in the place of the real one, and stand-ins for nvidia-smi and nvcc. (tests/python/bench runs all stages,
# with a stand-in for CMake too.)
# Usage: gpu_rehearsal.sh FOLDER PYTHON BUILD_PYTHON; the first Python has what tests need, the second what builds need.
set -eu
folder=$1 python=$2 build_python=$3
mkdir -p "$folder/bin"
for program in nvidia-smi nvcc; do
  printf '#!/bin/sh\nexec "%s" "%s" %s "$@"\n' "$python" "$PWD/tests/python/support/gpu_programs.py" $program >"$folder/bin/$program"
  chmod +x "$folder/bin/$program"
done
packages=$("$build_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
status=0
PATH=$PWD/$folder/bin:$PATH PYTHON=$python PYTHONPATH=$packages OUT=$folder/results STAND_IN_LOG=$folder/asked STAND_IN_FAILS= \
  bash bench/gpu.sh --rehearse --seconds 2400 --build "$folder" build correctness start || status=$?
[ "$(ls "$folder/results" | wc -l)" = 3 ] || { ls "$folder/results" >&2; echo "needed: three files" >&2; exit 1; }
exit $status

#!/usr/bin/env bash
# All that takes a GPU, in under ten minutes and without a network: build, GPU tests, compute-sanitizer, benchmarks.
# usage: gpu_check.sh FOLDER   (PYTHON=python3 that has torch, triton, pytest, pytest-benchmark, hypothesis, mpmath, matplotlib)
# Every part runs, whatever the others did; what each printed is in FOLDER, and the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
python=${PYTHON:-python3}
mkdir -p "$folder"
failed=()

part() { # name, most seconds, command
  local name=$1 most=$2 begin=$SECONDS
  shift 2
  echo "== $name"
  timeout "$most" "$@" >"$folder/$name.log" 2>&1 || failed+=("$name")
  tail -n 25 "$folder/$name.log"
  echo "== $name took $((SECONDS - begin)) s"
}

nvidia-smi >"$folder/machine.txt" 2>&1
part build 120 env IPRM_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
  "$python" -m pip install -q --no-build-isolation --no-deps --no-index -e .
part tests 140 "$python" -m pytest -q -n 8 -m gpu tests/iprm_kernels
part memcheck 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --error-exitcode 9 "$python" benchmarks/short_run.py
part racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" benchmarks/short_run.py
# two files, so that the second is there when the time of the first has run out
part operators 80 "$python" -m pytest -q benchmarks --ignore benchmarks/test_head.py --benchmark-json="$folder/operators.json"
part head 160 "$python" -m pytest -q benchmarks/test_head.py --benchmark-json="$folder/head.json"
part plot 20 "$python" benchmarks/plot.py "$folder"/operators.json "$folder"/head.json "$folder/results.png"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"

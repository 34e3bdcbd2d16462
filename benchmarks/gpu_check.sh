#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes and without a network: build, GPU tests, compute-sanitizer, benchmarks.
# usage: gpu_check.sh FOLDER   (PYTHON=python3 with torch, triton, pytest, pytest-benchmark, pytest-xdist, hypothesis, mpmath and
# matplotlib; the GPU tests of the trainer also need lightning and the rest of the extra `train`, and are left out without it)
# Every part runs, also after another has failed. FOLDER holds the output of each, and the exit status is 0 if all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
python=${PYTHON:-python3}
mkdir -p "$folder"
failed=()
left_out=()

part() { # name, time limit in seconds, command; SIGINT at the limit, so that pytest still writes its results
  local name=$1 most=$2 begin=$SECONDS
  shift 2
  echo "== $name"
  timeout -s INT -k 10 "$most" "$@" >"$folder/logs/$name.log" 2>&1 || failed+=("$name")
  tail -n 25 "$folder/logs/$name.log"
  echo "== $name took $((SECONDS - begin)) s"
}

finish() {
  tar -C "$folder" -czf "$folder/logs.tar.gz" logs && rm -r "$folder/logs"
  ((${#left_out[@]})) && echo "left out, for $python has no lightning: GPU tests of ${left_out[*]}"
  if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
  fi
  echo "all that ran passed"
}

mkdir -p "$folder/logs"
nvidia-smi >"$folder/logs/machine.log" 2>&1
part build 120 env IPRM_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
  "$python" -m pip install -q --no-build-isolation --no-deps --no-index -e .
((${#failed[@]})) && finish # nothing else can run
part tests 130 env TORCHINDUCTOR_COMPILE_THREADS=1 "$python" -m pytest -q -n 8 -m gpu --junitxml="$folder/tests.xml" tests/iprm_kernels
mapfile -t trainer < <(grep -rl "pytest.mark.gpu" tests/iprm --include='*.py' | sort)
if "$python" -c "import lightning" 2>/dev/null; then
  part trainer 35 "$python" -m pytest -q -m gpu --junitxml="$folder/trainer.xml" "${trainer[@]}"
else
  left_out=("${trainer[@]}")
fi
part warm 40 "$python" benchmarks/short_run.py # compiles the kernels, so that the sanitizer does not wait for it
part memcheck 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --error-exitcode 9 "$python" benchmarks/short_run.py
part racecheck 30 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" benchmarks/short_run.py
# one file per part, so that a part that runs out of time loses only its own results
part head 110 "$python" -m pytest -q benchmarks/test_head.py --benchmark-json="$folder/head.json"
part operators 35 "$python" -m pytest -q benchmarks/test_operators.py benchmarks/test_bandwidth.py --benchmark-json="$folder/operators.json"
part epoch 45 "$python" -m pytest -q benchmarks/test_epoch.py --benchmark-json="$folder/epoch.json"
part plot 15 "$python" benchmarks/plot.py "$folder"/{head,operators,epoch}.json "$folder/results.png"
finish

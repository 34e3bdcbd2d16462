#!/usr/bin/env bash
# Everything that needs a GPU, without a network, in two halves of at most 280 s each.
# usage: gpu_check.sh FOLDER [tests | benchmarks]   (without the second: both, one after the other)
#
# tests       the extension carried here or built, GPU tests, compute-sanitizer
# benchmarks  those that have a bar first: bandwidth, CUDA graphs, launches, memory, an epoch; then the others
#
# FOLDER gets one archive per half, packed anew after every part: the output of each part and its results. Every part runs, also
# after others have failed; the exit status is 0 if all passed. A kill at any second loses only what was running.
#
#   PYTHON=python3     with torch, triton, pytest, pytest-benchmark, pytest-xdist, hypothesis and mpmath; the GPU tests of the trainer
#                      also need lightning and the rest of the extra `train`, and are left out without it
#   IPRM_COMMIT        the commit, where there is no .git: $(git describe --always --dirty --abbrev=40)
#   TRITON_CACHE_DIR   build/triton-cache if unset, which `python benchmarks/warm_cache.py fill build/triton-cache` fills without a GPU
#   CUDA_HOME          /usr/local/cuda if unset: nvcc on PATH may be a wrapper in a folder without the libraries
#   SECONDS_PER_HALF=280, WORKERS=14
#
# benchmarks/plot.py draws the JSON files of the archive.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} TORCHINDUCTOR_COMPILE_THREADS=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton-cache}
[[ -z ${CUDA_HOME:-} && -d /usr/local/cuda ]] && export CUDA_HOME=/usr/local/cuda
mkdir -p "$folder"
seconds=${SECONDS_PER_HALF:-280}
margin=$((seconds / 20)) # for the last seconds of a part that ignores SIGINT, and for packing
work=

pack() { # into the archive of this half; at most 1 MB of each log, so that the archive stays below 16 MiB
  local log
  for log in "$work"/*.log; do
    if [[ $(stat -c %s "$log") -gt 1000000 ]]; then tail -c 1000000 "$log" >"$log.end" && mv "$log.end" "$log"; fi
  done
  tar -C "$work" --exclude '*.pid' -czf "$work.tar.gz" . && mv "$work.tar.gz" "$folder/$half.tar.gz"
}

stopped() {
  local pid
  for pid in "$work"/*.pid; do [[ -f $pid ]] && kill -TERM "$(cat "$pid")" 2>/dev/null; done
  echo "== stopped" | tee -a "$work/times.txt"
  pack
  rm -r "$work"
  exit 143
}

left() { echo $((end - SECONDS - $1)); } # seconds of this half, less those reserved for what follows

part() { # NAME SECONDS COMMAND...; SIGINT at the limit, so that pytest still writes its results
  local name=$1 most=$2 begin=$SECONDS status
  shift 2
  [[ $most -gt $(left "$margin") ]] && most=$(left "$margin")
  if [[ $most -lt 1 ]]; then
    echo "== $name: no time left" | tee -a "$work/times.txt"
    return 1
  fi
  timeout -s INT -k 10 "$most" "$@" >"$work/$name.log" 2>&1 &
  echo $! >"$work/$name.pid" # in the background, because a signal interrupts `wait` but no command
  wait $!
  status=$?
  rm "$work/$name.pid"
  tail -n 12 "$work/$name.log"
  echo "== $name: status $status, $((SECONDS - begin)) of at most $most s" | tee -a "$work/times.txt"
  return $status
}

run() { # the same, then packed
  part "$@" || failed+=("$1")
  pack
}

sanitizers() { # memcheck and racecheck at once: each waits mostly for torch to start under the tool
  local tool pids=() skip=()
  compute-sanitizer --help 2>/dev/null | grep -q -e --kernel-regex-exclude && skip=(--kernel-regex-exclude 'kns=gemm|cutlass|cublas')
  for tool in memcheck racecheck; do
    part $tool 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool $tool --error-exitcode 9 "${skip[@]}" "$python" benchmarks/short_run.py &
    pids+=($!)
  done
  wait "${pids[0]}" || failed+=(memcheck)
  wait "${pids[1]}" || failed+=(racecheck)
  pack
}

extension() { # a carried extension with CUDA kernels if it can be imported, else built; without one Triton runs alone
  local imported='import sys, iprm_kernels as ik; built = ik.build_info(); print(built); sys.exit(built["extension"] != "cuda")'
  local scripts
  part carried 30 "$python" -c "$imported" && return
  scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))') # ninja, without which files compile in turn
  part build 120 env PATH="$scripts:$PATH" MAKEFLAGS= IPRM_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" \
    "$python" setup.py -q build_ext --inplace && part built 30 "$python" -c "$imported" && return
  failed+=(build)
  echo "no extension with CUDA kernels: Triton runs alone" | tee -a "$work/times.txt"
}

begin() { # the half's name
  half=$1
  failed=()
  work=$(mktemp -d)
  end=$((SECONDS + seconds))
  trap stopped TERM INT HUP
  timeout 10 nvidia-smi >"$work/machine.log" 2>&1
  if [[ -d $TRITON_CACHE_DIR ]]; then part cache 20 "$python" benchmarks/warm_cache.py moved "$TRITON_CACHE_DIR"; fi
  extension
  pack
}

finish() {
  if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" | tee -a "$work/times.txt"
    all=1
  else
    echo "all that ran passed" | tee -a "$work/times.txt"
  fi
  pack
  rm -r "$work"
}

tests() {
  local trainer lightning=0
  begin tests
  "$python" -c "import lightning" 2>/dev/null && lightning=35
  run tests "$(left $((100 + lightning)))" "$python" -m pytest -q -n "${WORKERS:-14}" -m gpu --junitxml="$work/tests.xml" tests/iprm_kernels
  sanitizers
  mapfile -t trainer < <(grep -rl "pytest.mark.gpu" tests/iprm --include='*.py' | sort)
  if ((lightning)); then
    run trainer $lightning "$python" -m pytest -q -m gpu --junitxml="$work/trainer.xml" "${trainer[@]}"
  else
    echo "left out, for $python has no lightning: GPU tests of ${trainer[*]}" | tee -a "$work/times.txt"
  fi
  finish
}

bench() { # NAME SECONDS ARGUMENTS OF PYTEST; one file of results per part
  run "$1" "$2" "$python" -m pytest -q --benchmark-json="$work/$1.json" "${@:3}"
}

benchmarks() {
  begin benchmarks
  bench bandwidth 40 benchmarks/test_bandwidth.py
  bench graph 70 benchmarks/test_head.py -k test_head_step_in_a_graph
  bench launches 30 benchmarks/test_head.py -k test_launches
  bench memory 30 benchmarks/test_head.py -k test_memory
  bench epoch 45 benchmarks/test_epoch.py
  bench operators 35 benchmarks/test_operators.py
  bench head 60 benchmarks/test_head.py -k "test_head_step and not graph and not by_batch"
  bench batches 30 benchmarks/test_head.py -k by_batch
  finish
}

all=0
for half in ${2:-tests benchmarks}; do $half; done
exit $all

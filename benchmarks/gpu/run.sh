#!/usr/bin/env bash
# The first half hour on a GPU, in the repository's root; README.md of this folder says what to look at.
#   benchmarks/gpu/run.sh right | times | sanitizers [RESULTS_FOLDER]
# PYTHON names the interpreter of an environment that has the package, built with RNNFAST_CUDA=ON. No step
# stops the ones after it, and each has a time limit.
set -uo pipefail
what=${1:?right, times or sanitizers}
out=${2:-build/gpu}
python=${PYTHON:-.venv/bin/python}
here=benchmarks/gpu
mkdir -p "$out"

# step NAME SECONDS COMMAND...: its output goes to RESULTS_FOLDER/NAME.txt too.
step() {
  local name=$1 limit=$2
  shift 2
  printf '\n== %s: %s\n' "$(date +%T)" "$name"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.txt" | tail -n 40
}

case $what in
  right)
    step facts 30 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,mig.mode.current --format=csv
    step info 60 env RNNFAST_CUDA=1 "$python" -m rnnfast info
    step probe-build 120 nvcc -O3 -std=c++20 -arch=native -o "$out/probe" $here/probe.cu
    step probe 60 "$out/probe"
    step tests 300 "$python" -m pytest tests/cuda/test_cuda.py -k "not emulated" -x -q
    step check 150 "$python" $here/check.py --seconds 100
    step quick 90 "$python" benchmarks/beside_cudnn.py --quick
    ;;
  times)
    step parts 180 "$python" $here/parts.py
    step training 240 "$python" benchmarks/beside_cudnn.py --json "$out/training.json"
    step inference 180 "$python" benchmarks/beside_cudnn.py --forward --json "$out/inference.json"
    for shape in "LSTM 256 8" "LSTM 512 8" "GRU 1024 32"; do
      # shellcheck disable=SC2086 # three arguments
      step "ncu ${shape// /-}" 90 ncu --clock-control none --set full -c 2 \
        -k regex:"forward_kernel|backward_kernel" "$python" $here/step.py $shape
    done
    ;;
  sanitizers)
    for tool in memcheck racecheck synccheck; do
      for tier in block cluster grid; do
        step "$tool-$tier" 90 env RNNFAST_CUDA_TIER=$tier compute-sanitizer --tool $tool "$python" $here/step.py
      done
    done
    ;;
  *)
    echo "$what is none of: right, times, sanitizers" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# The first half hour on a GPU, in the repository's root; README.md of this folder says what to look at.
#   benchmarks/gpu/run.sh right | times | sanitizers [RESULTS_FOLDER]
# PYTHON names the interpreter of an environment that has the package, built with RNNFAST_CUDA=ON. No step stops the ones
# after it. The time limits of the steps of a call add up to less than ten minutes.
set -uo pipefail
what=${1:?right, times or sanitizers}
out=${2:-build/gpu}
python=${PYTHON:-.venv/bin/python}
here=benchmarks/gpu
mkdir -p "$out"
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
export PYTHONSAFEPATH=1   # otherwise `python -m` imports the sources in this folder, which have no extension
export PYTHONUNBUFFERED=1 # what a stopped step has printed is kept

# step NAME SECONDS COMMAND...: its output goes to RESULTS_FOLDER/NAME.txt too.
step() {
  local name=$1 limit=$2
  shift 2
  printf '\n== %s: %s, at most %s s\n' "$(date +%T)" "$name" "$limit"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$out/$name.txt"
  echo "exit status ${PIPESTATUS[0]}" | tee -a "$out/$name.txt"
}

"$python" -c 'from rnnfast import _native; assert _native._cuda, "built without CUDA"; print(_native.__file__)' || exit 1

case $what in
  right)
    step facts 20 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,mig.mode.current --format=csv
    step facts 40 env RNNFAST_CUDA=1 "$python" -m rnnfast info
    step probe 60 nvcc -O3 -std=c++20 -arch=native -o "$built/probe" $here/probe.cu
    step probe 30 "$built/probe"
    # A warning of another torch is no failure here.
    step tests 180 "$python" -m pytest tests/cuda/test_cuda.py -k "not emulated" -W default --maxfail=20 -q \
      -p no:cacheprovider
    step check 130 "$python" $here/check.py --seconds 90
    step quick 80 "$python" benchmarks/beside_cudnn.py --quick --json "$out/quick.json"
    ;;
  times)
    step parts 110 "$python" $here/parts.py
    step training 170 "$python" benchmarks/beside_cudnn.py --json "$out/training.json"
    step inference 120 "$python" benchmarks/beside_cudnn.py --forward --json "$out/inference.json"
    for shape in "LSTM 256 8" "LSTM 512 8" "GRU 1024 32"; do
      # shellcheck disable=SC2086 # three arguments
      step "ncu" 50 ncu --clock-control none --set full -c 2 \
        -k regex:"forward_kernel|backward_kernel" "$python" $here/step.py $shape
    done
    ;;
  sanitizers)
    for tool in memcheck racecheck synccheck; do
      for tier in block cluster grid; do
        step "$tool" 60 env RNNFAST_CUDA_TIER=$tier compute-sanitizer --tool $tool "$python" $here/step.py
      done
    done
    ;;
  *)
    echo "$what is none of: right, times, sanitizers" >&2
    exit 2
    ;;
esac

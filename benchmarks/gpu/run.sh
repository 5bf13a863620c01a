#!/usr/bin/env bash
# What to run first on a GPU, in the repository's root: README.md of this folder says what each call answers.
#   benchmarks/gpu/run.sh CALL [RESULTS_FOLDER]
# CALL is right, check, costs, times, counters, memcheck, racecheck, synccheck or threads. Results go to RESULTS_FOLDER, or to
# OUT, or to build/gpu. PYTHON names the interpreter (.venv/bin/python). The package is the one that it has installed, or that
# PYTHONPATH holds (build.sh). No step stops the ones after it. The last lines are a table of the steps and how each ended, and
# the exit status is 1 if one failed. The steps of a call end within 480 s.
set -uo pipefail
what=${1-}
case $what in
  right | check | costs | times | counters | memcheck | racecheck | synccheck | threads) ;;
  *)
    echo "CALL is '$what'; expected right, check, costs, times, counters, memcheck, racecheck, synccheck or threads" >&2
    exit 2
    ;;
esac
out=${2:-${OUT:-build/gpu}}
python=${PYTHON:-.venv/bin/python}
here=benchmarks/gpu
ended=() # a line for each step
failed=0
mkdir -p "$out" || exit 1
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
export PYTHONSAFEPATH=1     # otherwise `python -m` imports the sources in this folder, which have no extension
export PYTHONUNBUFFERED=1   # what a stopped step has printed is kept
export PYTHONFAULTHANDLER=1 # a step that is stopped prints where it was

# step NAME SECONDS COMMAND...: ABRT has Python print its stack; a process that ignores it is killed after 5 s.
step() {
  local name=$1 limit=$2 status how
  shift 2
  printf '\n== %s: %s, at most %s s\n' "$(date +%T)" "$name" "$limit"
  timeout -s ABRT -k 5 "$limit" "$@"
  status=$?
  case $status in
    0) how=passed ;;
    124) how="stopped after $limit s" ;;
    137) how="killed" ;;
    *) how="failed: exit status $status" ;;
  esac
  ended+=("$(printf '%-40s %s' "$name" "$how")")
  [ "$status" = 0 ] || failed=1
  return "$status"
}

# -vv, since pyproject.toml has -q: a test's name is printed before it runs. A warning of another torch is no failure here.
tests() {
  step "tests: $1" 75 "$python" -m pytest tests/cuda/test_cuda.py -k "not emulated and ($2)" -vv --tb=short --maxfail=5 \
    -W default -p no:cacheprovider
}

# torch's allocator takes large pieces of memory, in which an access beyond a tensor is no error.
sanitize() {
  for tier in block cluster grid; do
    for shape in "LSTM 40 9" "GRU 40 9 --packed"; do
      # shellcheck disable=SC2086 # several arguments
      step "$1 $tier $shape" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 RNNFAST_CUDA_TIER=$tier \
        compute-sanitizer --tool "$1" --error-exitcode 1 --kernel-regex kns=rnnfast "$python" $here/step.py $shape
    done
  done
}

calls() {
  case $what in
    right)
      step facts 15 nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,mig.mode.current --format=csv
      step info 40 env RNNFAST_CUDA=1 "$python" -m rnnfast info
      tests block "block and not blocks"
      tests cluster cluster
      tests grid grid
      tests "the others" "blocks or not (block or cluster or grid)"
      ;;
    check)
      step check 300 "$python" $here/check.py --seconds 260
      step quick 120 "$python" benchmarks/beside_cudnn.py --quick --json "$out/quick.json"
      ;;
    costs)
      step "probe is compiled" 60 nvcc -O3 -std=c++20 -arch=native -o "$built/probe" $here/probe.cu &&
        step probe 30 "$built/probe"
      step parts 160 "$python" $here/parts.py
      for tier in cluster grid; do
        step "tier $tier" 80 "$python" benchmarks/beside_cudnn.py --constants --tier $tier --json "$out/$tier.json"
      done
      ;;
    times)
      step training 250 "$python" benchmarks/beside_cudnn.py --json "$out/training.json"
      step inference 150 "$python" benchmarks/beside_cudnn.py --forward --json "$out/inference.json"
      ;;
    counters)
      for shape in "LSTM 256 8" "LSTM 512 8" "GRU 1024 32"; do
        # shellcheck disable=SC2086 # three arguments
        step "ncu $shape" 120 ncu --clock-control none --set full -c 2 \
          -k regex:"forward_kernel|backward_kernel" "$python" $here/step.py $shape --steps 64
      done
      ;;
    memcheck | racecheck | synccheck) sanitize "$what" ;;
    threads)
      for n in 1 2 4 8 16; do
        [ "$n" -gt "$(nproc)" ] ||
          step "threads $n" $((60 + 60 / n)) "$python" -m rnnfast bench --threads $n --cell LSTM --beside torch.nn \
            --shape 100,32,256,256 --shape 50,128,512,512 --json "$out/threads-$n.json"
      done
      ;;
  esac
}

all() {
  local needed=_cuda
  [ "$what" != threads ] || needed=_C # which computes on the CPU
  step import 30 "$python" -c \
    "from rnnfast import _native as n; print(n.__file__); assert n.$needed, n.cuda_error or 'built without CUDA'" && calls
  printf '\n== %s: %s\n' "$(date +%T)" "$what"
  printf '%s\n' "${ended[@]}"
  return $failed
}

all 2>&1 | tee "$out/$what.txt"
exit "${PIPESTATUS[0]}"

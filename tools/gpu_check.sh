#!/usr/bin/env bash
# Everything that can only be seen on a GPU, in one command and less than ten minutes, without a network:
#
#   tools/gpu_check.sh                  all parts: build tests sanitizer bench
#   tools/gpu_check.sh build bench      only these (build does nothing twice)
#
# Builds the C core and the CUDA library in place, runs the tests on the backends cuda and cupy, a few of them
# under compute-sanitizer (memcheck, racecheck), then bench/gpu.py, which writes
# bench/results/gpu-<device>-<date>.json. Logs and a summary go to out/gpu_check.
#
# Needs Python >= 3.10 with its headers, nvcc, g++, a GPU, and the packages numpy, cffi, safetensors, setuptools,
# pytest, hypothesis and cupy; what is missing is taken from the folder of wheels PYLORA_WHEELS, if that is given.
# Settings: PYTHON, PYLORA_WHEELS, PYLORA_GPU_SECONDS (the whole, 560), PYLORA_GPU_JOBS (processes of tests),
# PYLORA_GPU_OUT.
#
# Ends with 0: all ran and all was right; 1: something was wrong or out of time; 2: it could not begin;
# 3: nothing was wrong, but something could not be run.
set -uo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
PYTHON=${PYTHON:-python3}
TOTAL=${PYLORA_GPU_SECONDS:-560}
OUT=${PYLORA_GPU_OUT:-$ROOT/out/gpu_check}
JOBS=${PYLORA_GPU_JOBS:-$(n=$(nproc); echo $((n < 8 ? n : 8)))}
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(build tests sanitizer bench)
for p in "${PARTS[@]}"; do
  case $p in build | tests | sanitizer | bench) ;; *)
    echo "no part named '$p'; there are: build tests sanitizer bench" >&2
    exit 2 ;;
  esac
done

rm -rf "$OUT"
mkdir -p "$OUT/site" "$OUT/tests"
export PYTHONPATH="$ROOT:$OUT/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
export PATH="$PATH:/usr/local/cuda/bin" PYLORA_NUM_THREADS=${PYLORA_NUM_THREADS:-2}
SUMMARY=() # name|result|seconds|remark
FAILED=0
LEFT_OUT=0

left() { echo $((TOTAL - SECONDS)); }
wants() { [[ " ${PARTS[*]} " == *" $1 "* ]]; }
note() { SUMMARY+=("$1|$2|$3|$4"); }
leave_out() {
  echo "LEFT OUT: $1: $2"
  note "$1" "left out" 0 "$2"
  LEFT_OUT=1
}
cannot() {
  echo "cannot begin: $1" >&2
  exit 2
}

# part NAME LIMIT COMMAND...: the command's output goes to a log, whose end is shown if it fails.
part() {
  local name=$1 limit=$2 began=$SECONDS rc
  shift 2
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    note "$name" "no time" 0 "the $TOTAL s were used up"
    FAILED=1
    return 1
  fi
  printf '\n=== %s  (%d s; at most %d s more)\n' "$name" "$SECONDS" "$limit"
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  if [ $rc = 0 ]; then
    note "$name" ok $((SECONDS - began)) "$(tail -n 1 "$OUT/$name.log" | cut -c 1-70)"
    tail -n 3 "$OUT/$name.log"
    return 0
  fi
  tail -n 60 "$OUT/$name.log"
  if [ $rc = 124 ] || [ $rc = 137 ]; then
    note "$name" "out of time" $((SECONDS - began)) "more than $limit s; see $name.log"
  else
    note "$name" FAILED $((SECONDS - began)) "ended with $rc; see $name.log"
  fi
  FAILED=1
  return 1
}

# ---- what is here ----

command -v "$PYTHON" >/dev/null || cannot "there is no $PYTHON"
command -v nvcc >/dev/null || cannot "there is no nvcc on PATH or in /usr/local/cuda/bin"
command -v g++ >/dev/null || cannot "there is no g++"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

missing() { # of these modules, those that cannot be found
  "$PYTHON" - "$@" <<'CODE'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
CODE
}
NEEDED=(numpy cffi pycparser safetensors setuptools pytest hypothesis cupy)
WANTED=(torch peft transformers ml_dtypes tokenizers jinja2 gguf typer rich)
if [ -n "${PYLORA_WHEELS:-}" ]; then
  for name in $(missing "${NEEDED[@]}" "${WANTED[@]}"); do
    "$PYTHON" -m pip install --quiet --no-index --find-links "$PYLORA_WHEELS" --no-deps \
      --target "$OUT/site" "${name/cupy/cupy-cuda13x}" 2>/dev/null && echo "from PYLORA_WHEELS: $name"
  done
fi
absent=$(missing "${NEEDED[@]}")
[ -z "$absent" ] || cannot "these Python packages are missing: $absent (PYLORA_WHEELS may name a folder of wheels)"
export ABSENT
ABSENT=$(missing "${WANTED[@]}")
[ -z "$ABSENT" ] || leave_out packages "missing, so what needs them is not run: $ABSENT"
"$PYTHON" -c 'import cupy; assert cupy.cuda.runtime.getDeviceCount()' 2>"$OUT/cupy.log" \
  || cannot "CuPy finds no GPU: $(tail -n 1 "$OUT/cupy.log")"

# ---- parts ----

build() { # the C core on one processor, the CUDA library on the others
  nvcc --version | tail -n 2
  PYLORA_CUDA=on PYLORA_NVCC_JOBS=$JOBS "$PYTHON" tools/build_cuda.py &
  local cuda=$!
  "$PYTHON" tools/build_core.py || { kill $cuda 2>/dev/null; return 1; }
  wait $cuda || return 1
  "$PYTHON" - <<'CODE'
from pylora.backends._cuda_abi import ffi
import pylora.backends._core
lib = ffi.dlopen("pylora/backends/libpylora_cuda.so")
device = ffi.new("pylora_cuda_device *")
if lib.pylora_cuda_device_info(0, device):
    raise SystemExit(ffi.string(lib.pylora_cuda_error()).decode())
print(f"built for {ffi.string(device.name).decode()}, sm_{device.major}{device.minor}")
CODE
}

# Every file of tests in a process of its own, as many at a time as there are jobs.
tests() {
  export PYLORA_TEST_BACKENDS=cuda,cupy OUT PYTHON
  # shellcheck disable=SC2016
  find tests -name 'test_*.py' | sort | xargs -P "$JOBS" -I FILE sh -c '
    log=$OUT/tests/$(printf %s FILE | tr / .).log
    $PYTHON -m pytest -q -p no:cacheprovider -k "cuda or cupy or gpu" FILE >"$log" 2>&1
    rc=$?
    [ $rc = 5 ] && rc=0 # none of its tests is about a GPU
    for name in $ABSENT; do
      [ $rc = 2 ] && grep -q "No module named .$name" "$log" && echo "left out: FILE needs $name" && rc=0
    done
    [ $rc = 0 ] || echo "FILE: $rc" >>"$OUT/tests/failed"'
  count_tests && [ ! -s "$OUT/tests/failed" ]
}
count_tests() { # of the files that have ended
  [ -s "$OUT/tests/failed" ] && grep -hE '^(FAILED|ERROR)' "$OUT"/tests/*.log
  cat "$OUT"/tests/*.log | "$PYTHON" -c '
import re, sys
counts = {}
for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", sys.stdin.read()):
    counts[what] = counts.get(what, 0) + int(n)
print(", ".join(f"{n} {what}" for what, n in counts.items()) or "no test ran")
sys.exit(not counts.get("passed"))'
}

# sanitizer TOOL: each operation once. Every array is an allocation of its own, not a piece of CuPy's pool, so
# that an access past its end is seen.
sanitizer() {
  mkdir -p "$OUT/no_pool"
  echo 'import cupy; cupy.cuda.set_allocator(None)' >"$OUT/no_pool/sitecustomize.py"
  PYTHONPATH="$OUT/no_pool:$PYTHONPATH" PYLORA_TEST_BACKENDS=cuda \
    compute-sanitizer --tool "$1" --error-exitcode 86 --target-processes all \
    "$PYTHON" -m pytest -q -p no:cacheprovider --hypothesis-profile few tests/ops/test_protocol.py \
    -k "cuda and (agrees_with_float64 or any_layout or decoding_is_prefill)"
}

bench() { # no case begins in the last part of the time: a large one takes a while
  local seconds=$(($(left) - 60))
  "$PYTHON" bench/gpu.py --seconds "$((seconds > 20 ? seconds : 20))"
}

export -f build tests count_tests sanitizer bench left
export ROOT OUT PYTHON JOBS TOTAL
call() { part "$1" "$2" env "BEGAN=$SECONDS" bash -c "SECONDS=\$BEGAN; $3"; }

ready=1
if wants build; then call build 220 build || ready=0; fi
if [ $ready = 1 ]; then
  if wants tests; then call tests 150 tests || count_tests; fi
  if wants sanitizer; then
    if command -v compute-sanitizer >/dev/null; then
      call memcheck 50 "sanitizer memcheck"
      call racecheck 50 "sanitizer racecheck"
    else
      leave_out sanitizer "there is no compute-sanitizer"
    fi
  fi
  wants bench && call bench $(($(left) - 5)) bench
fi

# ---- summary ----

printf '%s\n' "${SUMMARY[@]}" | "$PYTHON" -c '
import json, sys
rows = [line.rstrip("\n").split("|", 3) for line in sys.stdin]
print()
for name, result, seconds, remark in rows:
    print(f"{name:10} {result:12} {seconds:>4} s  {remark}")
keys = ("part", "result", "seconds", "remark")
json.dump([dict(zip(keys, row)) for row in rows], open(sys.argv[1], "w"), indent=1)
' "$OUT/summary.json"
echo "$SECONDS s; logs: $OUT"
[ $FAILED = 0 ] || exit 1
[ $LEFT_OUT = 0 ] || exit 3

#!/usr/bin/env bash
# What is tested and measured on a machine with an NVIDIA GPU, in parts that can run one at a time.
#
#     OUT=results benchmarks/gpu.sh PART...
#
# Run it at the root of a checkout in an environment that has the package's dependencies; the package
# need not be installed. Reports go to $OUT as JSON, with the machine, versions and commit in them,
# and are committed under benchmarks/results/. Each part ends by itself after its limit; benchmarks
# keep finished cells in $OUT/PART, so that a part which is run again goes on where it stopped.
#
#   kernels     tests of the device's kernels            paths      tests of decode steps, all splits
#   host        host kernels against memory              roundtrip  handing a layer to the host
#   device      block-sparse kernels against the buses   machine    ceilings of this machine
#   step        decode steps at the shapes of 7B and 8B  prefill    chunked prefill
#   evaluate    the headline table, oracles included
#
# Variables: LIMIT_S (of every part named, default 300), PYTHON, QUICK=--quick.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false
OUT=${OUT:-benchmarks/results} PYTHON=${PYTHON:-python3} QUICK=${QUICK:-} limit=${LIMIT_S:-300}
mkdir -p "$OUT"

run() { # run NAME COMMAND...
  local name=$1
  shift
  echo "== $name (at $SECONDS s)"
  timeout -s INT -k 10 "$limit" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.err"
  echo "status $?"
  grep -v Warning "$OUT/$name.err" | tail -5 | cut -c1-300
  tail -40 "$OUT/$name.txt" | cut -c1-220
}
tests() { # tests NAME PATH...
  local name=$1
  shift
  run "$name" "$PYTHON" -m pytest -m gpu -v -p no:cacheprovider --tb=short --durations=8 --maxfail=8 \
    -o faulthandler_timeout=60 "$@"
}
bench() { # bench NAME OPTION...
  local name=$1
  shift
  run "$name" "$PYTHON" -m fluxion_jax bench "$name" --output "$OUT/$name" "$@"
}

run build "$PYTHON" tools/build_native.py
for part in "$@"; do
  case $part in
    kernels) tests kernels tests/pallas_kernels tests/host_ops ;;
    paths) tests paths tests/attention tests/generation ;;
    host) JAX_PLATFORMS=cpu bench host --compare 1 $QUICK ;;
    device) bench device $QUICK ;;
    roundtrip | machine) bench "$part" ;;
    step) bench step --budget-s $((limit * 4 / 5)) $QUICK ;;
    prefill) bench prefill $QUICK ;;
    evaluate)
      run evaluate "$PYTHON" -m fluxion_jax evaluate --shared-prefix --workers "$(($(nproc) - 2))" \
        --protocol benchmarks/protocol.json --output "$OUT/evaluate"
      ;;
    *)
      echo "expected a part out of those at the top of $0, got $part" >&2
      exit 2
      ;;
  esac
done

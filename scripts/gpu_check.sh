#!/usr/bin/env bash
# Checks and measures MicroAdam on a machine with a GPU, in less than 8 minutes.
#
#   scripts/gpu_check.sh OUT
#
# Needs a GPU, nvcc, a C++ compiler, and torch >= 2.11, numpy, hypothesis and pytest in the Python that
# PYTHON names (default: python3). Nothing is installed: the native library is built in this checkout.
# Writes to OUT: build.log, tests.log, step, llama and memory.{json,md}, summary.json, and summary.md,
# which it prints last. Ends with an error where the build, a test or a benchmark failed, after
# everything else has run.
set -uo pipefail
[ $# -eq 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD MICROADAM_BACKEND=native
START=$SECONDS
declare -A status seconds

# stage NAME LIMIT_S COMMAND...: its output goes to OUT/NAME.log; a failure is told and remembered.
stage() {
    local name=$1 limit_s=$2 begin=$SECONDS
    shift 2
    timeout "$limit_s" "$@" >"$OUT/$name.log" 2>&1
    status[$name]=$? seconds[$name]=$((SECONDS - begin))
    printf '%-7s exit %s after %s s\n' "$name" "${status[$name]}" "${seconds[$name]}"
    [ "${status[$name]}" -eq 0 ] || tail -n 25 "$OUT/$name.log" >&2
}

architecture=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || {
    echo "gpu_check: $PYTHON finds no torch with a CUDA device" >&2
    exit 1
}
stage build 120 env MICROADAM_CUDA_ARCHITECTURES="$architecture" \
    "$PYTHON" setup.py build_ext --inplace
stage tests 150 "$PYTHON" -m pytest -q -m gpu tests/microadam
stage step 150 "$PYTHON" -m benchmarks.step --device cuda --models '2^30' bert-base --rounds 30 \
    --output "$OUT/step"
# One after the other, so that where the large model finds no room the rest is measured.
stage llama 90 "$PYTHON" -m benchmarks.step --device cuda --models llama2-7b --dtypes bfloat16 \
    --optimizers 'AdamW (fused)' MicroAdam --rounds 10 --output "$OUT/llama"
stage memory 60 "$PYTHON" -m benchmarks.memory --output "$OUT/memory"

{
    printf '# MicroAdam on this GPU\n\n`scripts/gpu_check.sh`, %s s in all\n\n' $((SECONDS - START))
    "$PYTHON" -m microadam | sed 's/^/    /'
    printf '\n| stage | exit status | seconds |\n| --- | --- | --- |\n'
    for name in build tests step llama memory; do
        printf '| %s | %s | %s |\n' "$name" "${status[$name]}" "${seconds[$name]}"
    done
    printf '\n'
    tail -n 1 "$OUT/tests.log"
    printf '\n'
    cat "$OUT/step.md" "$OUT/llama.md" "$OUT/memory.md" 2>/dev/null
} >"$OUT/summary.md"
"$PYTHON" - "$OUT" "$(git rev-parse HEAD 2>/dev/null)" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
parts = {name: out / f"{name}.json" for name in ("step", "llama", "memory")}
summary = {"commit": sys.argv[2], "tests": (out / "tests.log").read_text().splitlines()[-1:]}
summary |= {name: json.loads(path.read_text()) for name, path in parts.items() if path.exists()}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
PYTHON
cat "$OUT/summary.md"
[ "${status[*]}" = "0 0 0 0 0" ]

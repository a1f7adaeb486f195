#!/usr/bin/env bash
# Checks and measures MicroAdam on a machine with a GPU, in less than 8 minutes.
#
#   scripts/gpu_check.sh OUT
#
# Needs a GPU, nvcc, a C++ compiler, and torch >= 2.11, setuptools >= 77, numpy, hypothesis and pytest
# in the Python that PYTHON names (default: python3). Nothing is installed: the native library is built
# in this checkout. Writes log.txt, summary.json and summary.md to OUT, and prints summary.md last. Exits
# with an error if the build, a test or a benchmark failed, but only after everything else has run.
set -uo pipefail
[ $# -eq 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH PYTHONPATH=$PWD MICROADAM_BACKEND=native
START=$SECONDS
declare -A status seconds
: >"$OUT/log.txt"

# stage NAME LIMIT_S COMMAND...: output goes to OUT/log.txt; a failure is reported and remembered.
stage() {
    local name=$1 limit_s=$2 begin=$SECONDS
    shift 2
    printf '\n== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
    timeout -s INT -k 20 "$limit_s" "$@" >>"$OUT/log.txt" 2>&1  # INT: pytest reports failures so far
    status[$name]=$? seconds[$name]=$((SECONDS - begin))
    printf '%-7s exit %s after %s s\n' "$name" "${status[$name]}" "${seconds[$name]}"
    [ "${status[$name]}" -eq 0 ] || tail -n 100 "$OUT/log.txt" >&2
}

architecture=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || {
    echo "gpu_check: $PYTHON finds no torch with a CUDA device" >&2
    exit 1
}
mapfile -t rivals < <("$PYTHON" -c '
from benchmarks.optimizers import rivals_in_speed
print(*rivals_in_speed(), sep="\n")')

stage build 100 env MICROADAM_CUDA_ARCHITECTURES="$architecture" \
    "$PYTHON" setup.py build_ext --inplace
# After an illegal access on the GPU everything that follows fails, too.
stage tests 170 "$PYTHON" -m pytest -v --maxfail=5 --tb=short --hypothesis-profile=quick -m gpu \
    tests/microadam
# The largest last: in float32 it takes some 50 GB, and what is measured before it fails is kept.
stage step 110 "$PYTHON" -m benchmarks.step --device cuda --models bert-base '2^30' \
    --dtypes bfloat16 float32 --rounds 30 --output "$OUT/step"
# Separately, so that the rest is measured even if the large model does not fit.
stage llama 70 "$PYTHON" -m benchmarks.step --device cuda --models llama2-7b --dtypes bfloat16 \
    --optimizers 'AdamW (fused)' MicroAdam --rounds 10 --output "$OUT/llama"
stage memory 30 "$PYTHON" -m benchmarks.memory --device cuda --optimizers "${rivals[@]}" \
    --output "$OUT/memory"

{
    printf '# MicroAdam on this GPU\n\n`scripts/gpu_check.sh`, %s s in all\n\n' $((SECONDS - START))
    "$PYTHON" -m microadam | sed 's/^/    /'
    printf '\n| stage | exit status | seconds |\n| --- | --- | --- |\n'
    for name in build tests step llama memory; do
        printf '| %s | %s | %s |\n' "$name" "${status[$name]}" "${seconds[$name]}"
    done
    printf '\n%s\n\n' "$(grep -E '^=+ .* in [0-9.]+s' "$OUT/log.txt" | tr -d = )"
    cat "$OUT/step.md" "$OUT/llama.md" "$OUT/memory.md" 2>/dev/null
} >"$OUT/summary.md"
"$PYTHON" - "$OUT" "$(git rev-parse HEAD 2>/dev/null)" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
summary = {"commit": sys.argv[2]}
for name in ("step", "llama", "memory"):
    if (path := out / f"{name}.json").exists():
        summary[name] = json.loads(path.read_text())
        path.unlink()
        path.with_suffix(".md").unlink()
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
PYTHON
cat "$OUT/summary.md"
[ "${status[*]}" = "0 0 0 0 0" ]

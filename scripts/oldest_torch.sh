#!/usr/bin/env bash
# Compiles the native step against the headers of the oldest torch that pyproject.toml allows, which
# lack names that newer ones declare. Its smallest wheel, the one for macOS, has the same headers.
#
#   PYTHON=EXE   the interpreter whose pip downloads it (80 MB, to build/oldest_torch; default: python3)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
FOLDER=build/oldest_torch

version=$(sed -n 's/^dependencies = \["torch>=\([0-9.]*\)"\]$/\1/p' pyproject.toml)
if [ ! -d "$FOLDER/$version" ]; then
    "$PYTHON" -m pip download -q --no-deps --only-binary :all: --platform macosx_14_0_arm64 \
        --python-version 3.12 --dest "$FOLDER" "torch==$version.0"
    "$PYTHON" -m zipfile -e "$FOLDER/torch-$version.0"-*.whl "$FOLDER/unpacked"
    mv "$FOLDER/unpacked/torch/include" "$FOLDER/$version"
    rm -r "$FOLDER/unpacked" "$FOLDER"/*.whl
fi

major=${version%.*} minor=${version#*.}
target=$(printf '0x%02x%02x000000000000' "$major" "$minor")
grep -q "DTORCH_TARGET_VERSION=$target" setup.py ||
    { echo "oldest_torch: setup.py does not compile for torch $version, TORCH_TARGET_VERSION=$target" >&2; exit 1; }
for source in csrc/library.cpp csrc/cpu/step.cpp csrc/cuda/step.cpp; do
    # The part of CUDA's header that the tests emulate is all that is needed.
    "${CXX:-c++}" -std=c++17 -fsyntax-only -fvisibility=hidden -Wall -Wextra -Werror "-DTORCH_TARGET_VERSION=$target" -DMICROADAM_WITH_CUDA \
        -isystem "$FOLDER/$version" -isystem tests/cuda_emulation "$source"
    echo "$source compiles with torch $version"
done

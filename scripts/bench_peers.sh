#!/bin/sh
# Builds .venv-bench: kdlab beside the peers of the benchmarks, each at its pinned version; called by `make peers`.
#   sh scripts/bench_peers.sh STAMP      PYTHON=... in the environment picks the Python, which must be 3.11 or 3.12
# Needs a C++17 compiler and no GPU. Running it again goes on where it stopped.
set -eu
cd "$(dirname "$0")/.."
stamp=${1:-.venv-bench/.kdlab-peers}

say() { printf 'peers: %s\n' "$*" >&2; }

uv=$PWD/.venv/bin/uv
venv=$PWD/.venv-bench
wheels=$venv/wheels
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" MAX_JOBS="${MAX_JOBS:-2}"

say "about 8 GB, and two compilations on $MAX_JOBS cores: torch-scatter 6 minutes, mmcv 18 minutes"
command -v g++ >/dev/null 2>&1 || { say "needs a C++ compiler: apt-get install -y g++"; exit 1; }
[ -x "$venv/bin/python" ] || "$uv" venv --quiet --python "${PYTHON:-3.11}" "$venv"

# torchvision's wheel wants the torch of the registry, not the CPU build; setuptools 80 lacks what mmcv's build imports.
pins="torch==2.13.0 torchvision==0.28.0 numpy<2 setuptools<80 opencv-python-headless==4.11.0.86"
# shellcheck disable=SC2086
"$uv" pip install --quiet $pins pip wheel ninja psutil nuscenes-devkit==1.2.0 spconv==2.3.8 numba simplejpeg orjson \
    mmengine==0.10.7 six terminaltables
# mmengine brings the OpenCV with windows, whose files are the same folder's: both go, the headless one comes back.
"$uv" pip uninstall --quiet opencv-python opencv-python-headless
# shellcheck disable=SC2086
"$uv" pip install --quiet $pins

# Builds a wheel once and keeps it: build NAME==VERSION FILE-PATTERN
build() {
    # shellcheck disable=SC2086
    if ! ls "$wheels"/$2 >/dev/null 2>&1; then
        say "compiling $1"
        python -m pip wheel --quiet --no-build-isolation --no-deps "$1" -w "$wheels"
    fi
    # shellcheck disable=SC2086
    "$uv" pip install --quiet --no-deps "$wheels"/$2
}
build torch-scatter==2.1.2 'torch_scatter-*.whl'
MMCV_WITH_OPS=1 FORCE_CUDA=0 build mmcv==2.1.0 'mmcv-*.whl'
"$uv" pip install --quiet --no-deps mmdet==3.2.0 mmdet3d==1.4.0

# shellcheck disable=SC2086
"$uv" pip install --quiet -r pyproject.toml $pins pytest pytest-timeout hypothesis
"$uv" pip install --quiet --no-deps -e .
python -c 'import kdlab, mmcv.ops, mmdet3d.models, spconv.pytorch, torch_scatter' ||
    { say "a peer does not load, see above"; exit 1; }
touch "$stamp"
say "done"

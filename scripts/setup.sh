#!/bin/sh
# Installs kdlab and everything that it needs into .venv; called by make. Running it again is harmless.
#   sh scripts/setup.sh STAMP      PYTHON=... in the environment picks the Python for a new .venv
# STAMP is written when nothing is missing.
set -eu
cd "$(dirname "$0")/.."
stamp=${1:-.venv/.kdlab-setup}

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
    for line in "$@"; do say "$line"; done
    exit 1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" && echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Installs Debian or Ubuntu packages when root; otherwise says the command and fails.
apt_install() {
    if ! command -v apt-get >/dev/null 2>&1; then
        say "missing system packages, by their Debian names: $*"
        return 1
    elif [ "$(id -u)" -ne 0 ]; then
        say "missing system packages; install them with:"
        say "    sudo apt-get install -y $*"
        return 1
    fi
    say "installing system packages: $*"
    log=$(mktemp)
    if { apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >"$log" 2>&1; then
        rm -f "$log"
    else
        cat "$log" >&2
        rm -f "$log"
        say "apt-get could not install them; try: apt-get update && apt-get install -y $*"
        return 1
    fi
}

make_venv() {
    python=$(find_python) || {
        found=${PYTHON:-python3}
        version=$("$found" --version 2>/dev/null) || version="not found"
        die "kdlab needs Python 3.11 or 3.12; $found is: $version" \
            "Install one of them and name it:  make PYTHON=/path/to/python3.12 setup" \
            "With uv:     uv python install 3.12 && make PYTHON=\"\$(uv python find 3.12)\" setup" \
            "With conda:  conda env create -f environment.yml && conda activate kdlab"
    }
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        minor=$("$python" -c 'import sys; print(sys.version_info.minor)')
        apt_install "python3.$minor-venv" || die "then run make again ($python lacks the module venv)"
    fi
    say "making .venv with $python ($("$python" --version))"
    "$python" -m venv --clear .venv
}

has_pip() { .venv/bin/python -m pip --version >/dev/null 2>&1; }

if ! supported .venv/bin/python; then
    make_venv
elif ! has_pip && ! .venv/bin/python -m ensurepip >/dev/null 2>&1; then
    make_venv # left over from a try without ensurepip
fi

uv_pin=$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.lock)
if [ "$(.venv/bin/uv --version 2>/dev/null | cut -d' ' -f2)" != "${uv_pin#uv==}" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$uv_pin"
fi

say "installing the packages of requirements.lock (a few minutes and about 8 GB the first time)"
export VIRTUAL_ENV="$PWD/.venv"
.venv/bin/uv pip install --quiet -r requirements.lock
.venv/bin/uv pip install --quiet --no-deps -e .
.venv/bin/uv pip check --quiet ||
    say "the installed packages do not fit pyproject.toml: run 'make lock' if you changed it"

missing=$(.venv/bin/python -c 'from kdlab.doctor import missing_packages; print(*missing_packages())')
# shellcheck disable=SC2086
if [ -n "$missing" ] && ! apt_install $missing; then
    say "until then Open3D does not load, so the simulator and the 3D scene do not work"
    exit 0
fi
touch "$stamp"
say "done; '.venv/bin/kdlab doctor' says what this machine has"

#!/bin/sh
# Makes .venv hold what a target needs: `base` (client and coordinator), `engines` (with torch and jax), `full` (to test
# it) or `bench` (`full` and the tools that the benchmarks compare with).
# It installs only what constraints.txt pins, and never a CUDA package.
set -eu

wanted=${1:?usage: scripts/setup.sh base|engines|full|bench}
cd "$(dirname "$0")/.."

case $wanted in
    base) target='.' enough='base engines full bench' ;;
    engines) target='.[torch,jax]' enough='engines full bench' ;;
    full) target='.[torch,jax,dev]' enough='full bench' ;;
    bench) target='.[torch,jax,bench,dev]' enough='bench' ;;
    *) echo "setup: '$wanted' is not known; it is base, engines, full or bench" >&2; exit 2 ;;
esac

# A stamp names the very files, the place and the interpreter it was made from: a change of any installs again.
stamp_key() {
    { pwd; .venv/bin/python --version; cat pyproject.toml constraints.txt; } | cksum
}

if [ -x .venv/bin/python ]; then
    key=$(stamp_key)
    for made in $enough; do
        if [ "$(cat ".venv/stamp-$made" 2>/dev/null)" = "$key" ]; then exit 0; fi
    done
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version) found, Python 3.11 or newer is needed; name one with PYTHON=..." >&2
    exit 1
}
if [ ! -x .venv/bin/python ]; then
    echo "setup: making a virtual environment in .venv"
    "$python" -m venv .venv
fi
python=$PWD/.venv/bin/python

# Reads the names an installer would install, one a line, and says whether CUDA is among them.
names_cuda() { grep -Eiq '^(nvidia|cuda|triton)' "$1"; }

install_with_uv() {
    "$python" -m uv --version >/dev/null 2>&1 \
        || "$python" -m pip install -qq --disable-pip-version-check uv || return 1
    # uv does not read pip's setting; without one, ask uv itself for the CPU build.
    if [ -n "${PIP_FIND_LINKS+set}" ]; then
        set --
        export UV_FIND_LINKS="$PIP_FIND_LINKS"
    else
        set -- --torch-backend cpu
    fi
    set -- "$@" --python "$python" -c constraints.txt -b constraints.txt -e "$target"
    "$python" -m uv pip install --dry-run "$@" 2>.venv/log || { cat .venv/log >&2; return 1; }
    sed -n 's/^ + //p' .venv/log >.venv/plan
    if names_cuda .venv/plan; then
        echo "setup: uv would install CUDA packages; not using it" >&2
        return 1
    fi
    # Python would compile torch and transformers at their first import, or at every one where it may not write.
    "$python" -m uv pip install --quiet --compile-bytecode "$@"
}

install_with_pip() {
    "$python" -m pip install -qq --dry-run --disable-pip-version-check --report .venv/plan.json \
        -c constraints.txt -e "$target" || return 1
    "$python" -c 'import json; print(*(i["metadata"]["name"] for i in json.load(open(".venv/plan.json"))["install"]), sep="\n")' >.venv/plan
    if names_cuda .venv/plan; then
        echo "setup: pip would install CUDA packages; name a folder with a CPU build of torch in PIP_FIND_LINKS" >&2
        return 1
    fi
    "$python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e "$target"
}

echo "setup: installing $target into .venv, as pinned in constraints.txt"
if ! install_with_uv; then
    echo "setup: uv is missing or failed; installing with pip, which takes a minute or two" >&2
    install_with_pip || { echo "setup: pip failed too; the lines above say why" >&2; exit 1; }
fi

stamp_key >".venv/stamp-$wanted"

#!/bin/sh
# Writes constraints.txt anew: the newest versions that install together, over all extras, name==version lines only.
set -eu
cd "$(dirname "$0")/.."

if [ -n "${PIP_FIND_LINKS+set}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; else set -- --torch-backend cpu; fi
.venv/bin/python -m uv pip compile --quiet --upgrade --all-extras --python-version 3.11 \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@" pyproject.toml -o .venv/constraints.new

# The local part of a version (torch's +cpu) says where a file came from; it does not belong in a pin.
sed 's/+[a-z0-9.]*$//' .venv/constraints.new >.venv/constraints.clean
if grep -Ev '^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$' .venv/constraints.clean; then
    echo "pin: the lines above are not name==version; constraints.txt is left as it was" >&2
    exit 1
fi
if grep -Ei '^(nvidia|cuda|triton)' .venv/constraints.clean; then
    echo "pin: the lines above are CUDA packages; constraints.txt is left as it was" >&2
    exit 1
fi
cp .venv/constraints.clean constraints.txt
echo "pin: wrote constraints.txt, $(wc -l <constraints.txt) packages"

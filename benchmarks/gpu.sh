#!/usr/bin/env bash
# Everything that only a GPU can show, in at most 8 minutes; results as JSON, a file for each part, in the folder --out.
#
#   benchmarks/gpu.sh --wheels              beforehand, with network: gather what a GPU server lacks into benchmarks/wheels
#   benchmarks/gpu.sh --out DIR             on the GPU server, without network
#   benchmarks/gpu.sh --dry-run --out DIR   both, on this machine's CPU and with tiny sizes, in under 3 minutes
#
# The server's Python (PYTHON, by default python; 3.12) has torch 2.11 and triton 3.6 or newer and the package's other
# dependencies. What it may lack is taken from the wheels, which are put in front of its own packages and not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} wheels=benchmarks/wheels out='' dry='' gather=''
while [ $# -gt 0 ]; do
    case $1 in
    --wheels) gather=1 ;;
    --dry-run) gather=1 dry=--dry-run ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    *) echo "gpu.sh: unknown argument $1; give --wheels, --out DIR or --dry-run --out DIR" >&2 && exit 2 ;;
    esac
    shift
done
[ -n "$gather" ] || [ -n "$out" ] || { echo "gpu.sh: give --wheels or --out DIR" >&2 && exit 2; }
[ -z "$dry" ] || [ -n "$out" ] || { echo "gpu.sh: --dry-run needs --out DIR" >&2 && exit 2; }

if [ -n "$gather" ]; then
    mkdir -p "$wheels"
    fetch=("$python" -m pip download -q -d "$wheels" --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}")
    fetch+=(--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64)
    "${fetch[@]}" 'pydantic>=2.10,<3'
    "${fetch[@]}" --no-deps 'torchcfm>=1.0.7' 'POT>=0.9.5'
    "$python" -m pip wheel -q --no-deps -w "$wheels" .
    du -sh "$wheels"
    echo "wheels: done in $SECONDS s"
fi
[ -n "$out" ] || exit 0

mkdir -p "$out"
if [ -z "$dry" ]; then # a wheel of another Python version would not import
    unpacked=$(mktemp -d) && trap 'rm -rf "$unpacked"' EXIT
    "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps --target "$unpacked" \
        pydantic pydantic_core annotated_types typing_inspection torchcfm POT orwcfm_fast
    export PYTHONPATH=$unpacked${PYTHONPATH:+:$PYTHONPATH}
fi
# -P: the folder orwcfm_fast here is without kernels, cli and benchmarks, which only an installed package has
env -u TRITON_INTERPRET "$python" -P -m orwcfm_fast.benchmarks.gpu --out "$out" $dry
echo "all: done in $SECONDS s"

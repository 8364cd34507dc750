#!/usr/bin/env bash
# GPU tests, then the benchmarks of kernels and loop, on this machine's NVIDIA GPU; writes
# benchmarks/results/<gpu>-<date>.json and loop-<gpu>-<date>.json.
# Needs the package with its test extra: pip install -e '.[test]'. Meant to stay under 8 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "benchmarks/gpu.sh: no NVIDIA GPU here")'
env -u TRITON_INTERPRET "$python" -m pytest tests/kernels tests/test_no_sync.py tests/test_graph.py -m gpu
env -u TRITON_INTERPRET "$python" -c 'from orwcfm_fast.cli import main; main()' bench --full --out benchmarks/results

#!/usr/bin/env bash
# Step costs on a machine with JAX and a GPU and no network. Wheels of what it lacks are unpacked beside the repository:
#
#     benchmarks/on_gpu.sh keras.whl namex.whl optree.whl tqdm.whl
#
# The result is benchmarks/results/gpu.json; `python -m benchmarks --render` puts it into docs/benchmarks.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
[ $# -eq 0 ] || python3 -m pip install --quiet --no-index --no-deps --target "$SITE" "$@"
PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" python3 -m benchmarks gpu

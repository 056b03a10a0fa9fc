#!/usr/bin/env bash
# All that a machine with a GPU is needed for, in one command; --help and --list say more.
# PYTHON=... or --python chooses the Python that has torch; there is no need for a network.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu_day "$@"

#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from a plain checkout: bash benchmarks/gpu_check.sh [PART ...] [--out FOLDER]
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"

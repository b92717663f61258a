#!/usr/bin/env bash
# Decodes on a machine with NVIDIA GPUs; run it there, in the checkout.
#
#   bash launch/gpu.sh --prompt='Why is the sky blue?'
#
# Flags go through to kvjax.decode. CONFIG names another config than configs/qwen3_gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --editable '.[gpu,hub]'
fi
exec .venv/bin/python -m kvjax.decode --config="${CONFIG:-configs/qwen3_gpu.py}" "$@"

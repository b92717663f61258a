#!/usr/bin/env bash
# Decodes on a Cloud TPU VM of one host (v5e-8, v6e-8, ...); run it on the VM, in the checkout.
#
#   bash launch/tpu_vm.sh --prompt='Why is the sky blue?'
#
# Flags go through to kvjax.decode. CONFIG names another config than configs/qwen3_tpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --editable '.[tpu,hub]'
fi
exec .venv/bin/python -m kvjax.decode --config="${CONFIG:-configs/qwen3_tpu.py}" "$@"

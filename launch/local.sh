#!/usr/bin/env bash
# Sets up a virtual environment in the checkout (.venv) and runs one thing in it, on this machine.
#
#   bash launch/local.sh decode [flags]     decodes with the model in the tree (kvjax.decode's flags go through)
#   bash launch/local.sh test [flags]       runs the tests (pytest's flags go through)
#   bash launch/local.sh bench [flags]      measures decoding (kvjax.bench decode's flags go through)
#   bash launch/local.sh check              formatter and linter, as CI runs them
#
# Needs Python 3.11 or newer and pip. PYTHON names the interpreter, VENV the folder of the environment.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
task=${1:-help}
shift || true

find_python() {
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; install one, or set PYTHON to it." >&2
  exit 2
}

# set_up EXTRAS: installs this checkout with those extras, once for each state of setup.cfg.
set_up() {
  local stamp="$venv/.installed-$1"
  if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    local python
    python=$(find_python)
    echo "setting up $venv with $("$python" --version) ..." >&2
    [ -d "$venv" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
  fi
}

case "$task" in
  decode)
    set_up base
    exec "$venv/bin/python" -m kvjax.decode "$@"
    ;;
  bench)
    set_up base
    exec "$venv/bin/python" -m kvjax.bench decode "$@"
    ;;
  test)
    set_up test
    exec "$venv/bin/python" -m pytest --numprocesses=2 --dist=worksteal "$@"
    ;;
  check)
    set_up test
    "$venv/bin/ruff" format --check .
    "$venv/bin/ruff" check .
    ;;
  *)
    sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'
    [ "$task" = help ] || exit 2
    ;;
esac

#!/usr/bin/env bash
# Installs into .venv and fine-tunes the emoji model by AlignProp with DiffExp's exploration.
#   bash scripts/quickstart.sh [WORKDIR] [further flags of diffexp_jax.train]
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=${1:-runs/quickstart}
python=.venv/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
stamp=.venv/requirements.installed
if ! cmp -s requirements.txt "$stamp"; then
  "$python" -m pip install --disable-pip-version-check -r requirements.txt
  "$python" -m pip install --disable-pip-version-check --no-deps -e .
  cp requirements.txt "$stamp"
fi
exec "$python" -m diffexp_jax.train --config configs/alignprop.py:model=emoji,explore=true --workdir "$workdir" "${@:2}"

#!/usr/bin/env bash
# Installs into .venv and fine-tunes the emoji model by AlignProp with DiffExp's exploration.
#   bash scripts/quickstart.sh [WORKDIR] [further flags of diffexp_jax.train]
# PYTHON=python3.12 before it says which Python makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=${1:-runs/quickstart}
. tools/machine/venv.sh # sets python
stamp=.venv/requirements.installed
if ! cmp -s requirements.txt "$stamp"; then
  "$python" -m pip install --disable-pip-version-check -r requirements.txt
  "$python" -m pip install --disable-pip-version-check --no-deps -e .
  cp requirements.txt "$stamp"
fi
exec "$python" -m diffexp_jax.train --config configs/alignprop.py:model=emoji,explore=true --workdir "$workdir" "${@:2}"

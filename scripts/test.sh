#!/usr/bin/env bash
# Installs into .venv what the tests need (torch and the reference implementations too), then lint and tests.
#   bash scripts/test.sh [arguments of pytest, e.g. -m slow]
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/machine/venv.sh # sets python
stamp=.venv/requirements-test.installed
if ! cat requirements.txt requirements-test.txt | cmp -s - "$stamp"; then
  # torch first and alone: a later package would otherwise pull another build of it
  "$python" -m pip install --disable-pip-version-check "$(grep '^torch==' requirements-test.txt)"
  alone="^open_clip_torch=="  # and this without its dependencies: torchvision pulls another torch too
  "$python" -m pip install --disable-pip-version-check -r requirements.txt -r <(grep -v "$alone" requirements-test.txt)
  "$python" -m pip install --disable-pip-version-check --no-deps "$(grep -o "${alone}[0-9.]*" requirements-test.txt)"
  "$python" -m pip install --disable-pip-version-check --no-deps -e .
  cat requirements.txt requirements-test.txt > "$stamp"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -q -n auto --dist loadfile "$@"

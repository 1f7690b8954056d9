#!/usr/bin/env bash
# Builds the documents in docs/ as a site, in site/. A broken link or anchor is an error.
#   bash scripts/docs.sh [serve]      open site/index.html; serve: shows it at http://127.0.0.1:8000 and again after each change
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/machine/venv.sh # sets python
if ! "$python" -c "import material, latex2mathml" 2> /dev/null; then
  grep -E "^(mkdocs-material|latex2mathml)==" requirements-test.txt | cut -d " " -f 1 \
    | xargs "$python" -m pip install --disable-pip-version-check
fi
export NO_MKDOCS_2_WARNING=1
exec "$python" -m mkdocs "${1:-build}" --strict

# Sourced by scripts/*.sh in the repository's folder: sets `python` to that of .venv, which is made if it is not there.
# shellcheck shell=bash
# PYTHON=python3.12 says which one makes it; Python 3.11 or newer is needed.

python=.venv/bin/python

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

bad() { echo "error: $1" >&2; exit 2; }

if [ -x "$python" ]; then
  is_new_enough "$python" || bad ".venv is of $("$python" --version 2>&1); wants Python 3.11 or newer: rm -r .venv, then PYTHON=python3.12 bash $0"
else
  base=${PYTHON:-python3}
  command -v "$base" > /dev/null || bad "$base: not found; wants Python 3.11 or newer: PYTHON=python3.12 bash $0"
  is_new_enough "$base" || bad "$base is $("$base" --version 2>&1); wants Python 3.11 or newer: PYTHON=python3.12 bash $0"
  "$base" -m venv .venv || { rm -rf .venv; bad "$base -m venv failed; on Debian and Ubuntu: apt install python3-venv"; }
fi

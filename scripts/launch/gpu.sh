#!/usr/bin/env bash
# A run on the GPUs of this machine, detached, with a log; docs/use/launch.md.
#   bash scripts/launch/gpu.sh --config configs/ddpo.py:model=sd15,reward=pickscore:DIR --workdir DIR [flags of the run]
# One process drives all GPUs. PROCESSES=8 starts eight with a GPU each (for rewards in plain Python: eight interpreters).
# FOREGROUND=1 waits for the end, and ends with its exit code; SIGTERM, SIGINT and SIGHUP are passed on.
set -euo pipefail

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
workdir='' before=''
for argument; do
  [[ $argument != --workdir=* ]] || workdir=${argument#*=}
  [[ $before != --workdir ]] || workdir=$argument
  before=$argument
done
[[ -n $workdir ]] || usage
processes=${PROCESSES:-1}
cd "$(dirname "$0")/../.."
mkdir -p "$workdir"

if [[ -z ${FOREGROUND:-} ]]; then
  FOREGROUND=1 setsid nohup "$BASH" "scripts/launch/$(basename "$0")" "$@" >"$workdir/launch.log" 2>&1 </dev/null &
  echo "started; stop it by: kill $!"
  echo "log: tail -f $workdir/launch.log $workdir/host-0.log"
  exit
fi

export JAX_NUM_PROCESSES=$processes JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-$((20000 + $$ % 20000))}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT HUP
for ((i = 0; i < processes; i++)); do
  if [[ $processes -gt 1 && -z ${CUDA_VISIBLE_DEVICES:-} ]]; then export CUDA_VISIBLE_DEVICES=$i; only=1; fi
  JAX_PROCESS_ID=$i "${PYTHON:-python}" -u -m diffexp_jax.train "$@" >>"$workdir/host-$i.log" 2>&1 &
  pids+=($!)
  if [[ -n ${only:-} ]]; then unset CUDA_VISIBLE_DEVICES; fi
done

code=0
for pid in "${pids[@]}"; do
  ended=0
  wait "$pid" || ended=$?
  while kill -0 "$pid" 2>/dev/null; do ended=0; wait "$pid" || ended=$?; done # a signal ends `wait`, not the process
  ((ended > code)) && code=$ended
done
exit "$code"

#!/usr/bin/env bash
# A run on all workers of a TPU pod slice, from any machine with gcloud; docs/use/launch.md.
#   export TPU=NAME ZONE=us-west4-a ACCELERATOR=v5litepod-64 VERSION=v2-alpha-tpuv5-lite BUCKET=my-bucket
#   bash scripts/launch/tpu.sh create         # SPOT=1 for one that may be taken away
#   bash scripts/launch/tpu.sh start --config configs/ddpo.py:model=sd15,reward=pickscore:DIR --workdir /mnt/runs/x
#   bash scripts/launch/tpu.sh keep  --config ... --workdir /mnt/runs/x   # start, and again after every preemption
#   bash scripts/launch/tpu.sh logs | status | stop | delete
# The run is detached from this machine. BUCKET is mounted at /mnt/runs, where workdirs outlive the TPU.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ $# -ge 1 ]] || usage
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"
repository=${REPOSITORY:-} # git address of this code, for create

tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --zone "$ZONE" "${@:2}"; }
on() { tpu ssh --worker "$1" --command "$2"; }
state() { tpu describe --format='value(state)' 2>/dev/null || echo MISSING; }

create() {
  local spot=()
  [[ -z ${SPOT:-} ]] || spot=(--spot)
  tpu create --accelerator-type "${ACCELERATOR:?}" --version "${VERSION:?}" ${spot[@]+"${spot[@]}"}
  on all "git clone -q $(printf %q "${repository:?REPOSITORY: the git address of this code}") diffexp_jax && cd diffexp_jax && python3 -m venv .venv \
    && .venv/bin/pip install -q -r requirements.txt && .venv/bin/pip install -q 'jax[tpu]==0.10.2' \
    && sudo mkdir -p /mnt/runs && sudo chmod a+w /mnt/runs"
  # the first worker alone writes, and reads what a run resumes from
  [[ -z ${BUCKET:-} ]] || on 0 "gcsfuse --implicit-dirs $(printf %q "$BUCKET") /mnt/runs"
}

start() {
  local run
  run="$(printf '%q ' .venv/bin/python -u -m diffexp_jax.train "$@")"
  on all "cd diffexp_jax && rm -f exit.txt && { setsid nohup bash -c $(printf %q "$run; echo \$? > exit.txt") \
    > run.log 2>&1 < /dev/null & echo \$! > pid.txt; }"
}

# "running", or the exit code of the first worker's process
status() { on 0 "cd diffexp_jax && cat exit.txt 2>/dev/null || { kill -0 \$(cat pid.txt) && echo running; } || echo gone"; }

stop() { on all "pkill -TERM -g \$(cat diffexp_jax/pid.txt)"; }

keep() {
  local code
  [[ $(state) != MISSING ]] || create
  start "$@"
  while sleep "${EVERY:-60}"; do
    case $(state) in
      READY) ;;
      MISSING) create && start "$@" && continue ;;
      PREEMPTED | TERMINATED | STOPPED) echo "$TPU was taken away: a new one" && tpu delete --quiet && create && start "$@" && continue ;;
      *) continue ;;
    esac
    code=$(status || echo unknown)
    case $code in
      running | unknown) ;;
      0) echo "the run has come to its end" && return ;;
      2) echo "bad input: see bash $0 logs" >&2 && return 2 ;;
      *) echo "ended with $code: started again" && start "$@" ;;
    esac
  done
}

case $1 in
  create | start | status | stop | keep) "$@" ;;
  logs) on "${WORKER:-0}" "tail -n ${LINES_SHOWN:-100} -f diffexp_jax/run.log" ;;
  delete) tpu delete --quiet ;;
  *) usage ;;
esac

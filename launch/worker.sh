#!/usr/bin/env bash
# On every worker of a TPU slice, called by tpu_vm.sh and tpu_queued.sh through ssh. The run's files are in
# ~/llava_jax_run: train.log, and pid, child, exit and stopped, which hold its state.
#
#   worker.sh install
#   worker.sh start CHIP CONFIG WORKDIR [--config.key=value …]    detached; does nothing during a run
#   worker.sh state    running, stopping, stopped, none, gone (ended without an exit code) or exit CODE
#   worker.sh stop     SIGTERM: train saves and ends with exit code 42
set -euo pipefail
RUN=$HOME/llava_jax_run

# Whether the process that runs train is there; after a reboot its id may be another program's.
named() { grep -qsa 'worker\.sh' "/proc/$(<"$RUN/pid")/cmdline"; }
# Checked twice: a process that is just becoming another program has no name.
alive() { [[ -s $RUN/pid ]] && { named || { [[ -d /proc/$(<"$RUN/pid") ]] && sleep 0.2 && named; }; }; }

state() {
  if alive; then
    if [[ -f $RUN/stopped ]]; then echo stopping; else echo running; fi
  elif [[ -f $RUN/stopped ]]; then
    echo stopped
  elif [[ -f $RUN/exit ]]; then
    echo "exit $(<"$RUN/exit")"
  elif [[ -f $RUN/pid ]]; then
    echo gone
  else
    echo none
  fi
}

say() { echo "llava_jax worker $(hostname): $(state)"; }

hold() {
  local code=0
  # shellcheck source=/dev/null
  . "launch/env/$1.sh"
  .venv/bin/python -m llava_jax train --config="$2" --workdir="$3" "${@:4}" &
  echo $! >"$RUN/child"
  wait $! || code=$?
  echo "$code" >"$RUN/exit"
}

cd "$(dirname "$0")/.."
case ${1:---help} in
  install)
    python3 -m pip install --quiet --user uv # the image's Python is older than the 3.11 we need; uv brings one
    python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt -e ".[tpu,gcs]"
    ;;
  start)
    mkdir -p "$RUN"
    if ! alive; then
      rm -f "$RUN"/{pid,child,exit,stopped}
      # A session of its own: the run outlives the ssh that started it.
      setsid launch/worker.sh hold "${@:2}" >>"$RUN/train.log" 2>&1 </dev/null &
      echo $! >"$RUN/pid"
    fi
    say
    ;;
  hold) hold "${@:2}" ;;
  state) say ;;
  stop)
    mkdir -p "$RUN"
    touch "$RUN/stopped"
    while alive && [[ ! -s $RUN/child ]]; do sleep 0.1; done
    ! alive || kill -TERM "$(<"$RUN/child")"
    say
    ;;
  *)
    sed -n -e '2,/^[^#]/s/^# \{0,1\}//p' launch/worker.sh >&2
    exit 2
    ;;
esac

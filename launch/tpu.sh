# shellcheck shell=bash
# The verbs of tpu_vm.sh and tpu_queued.sh; sourced by them. They define READY (the state in which a node can be used),
# PENDING (the states that lead there by themselves), nodes, create_node, delete_node and describe.
PATIENCE=5 # polls in a row that the workers do not answer before the node counts as lost

say() { echo "$(date +%H:%M:%S) $NAME: $*" >&2; }
pause() { run sleep "$POLL"; }

# remote NODE WORKER COMMAND [FLAG…]: sets `command` to a call on one worker of a node, or on all.
remote() {
  command=(gcloud compute tpus tpu-vm ssh "$1" --zone="$ZONE" --worker="$2" --quiet --strict-host-key-checking=no
    --ssh-flag=-oConnectTimeout=20 --command="$3" "${@:4}")
}

on_all_workers() {
  local node command
  for node in $(nodes); do
    remote "$node" all "$@" && run "${command[@]}" || return 1
  done
}

# ---- the node ---------------------------------------------------------------------------------------------------

# node_state ASSUMED: the state, MISSING, or UNKNOWN where no answer came; a dry run takes ASSUMED.
node_state() {
  local answer command
  describe
  if answer=$(ask "$1" "${command[@]}" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

wait_ready() {
  local state
  while true; do
    state=$(node_state "$READY")
    case " $READY $PENDING UNKNOWN " in
      *" $state "*) [[ $state != "$READY" ]] || return 0 ;;
      *) say "state $state instead of $READY" && return 1 ;;
    esac
    say "state $state, waiting for $READY"
    pause
  done
}

create() { create_node && wait_ready; }

# Packs what is sent to the workers, as it is in this folder now.
pack() {
  run mkdir -p build && run tar --exclude=__pycache__ -czf "build/$NAME.tar.gz" README.md LICENSE pyproject.toml \
    requirements.txt configs launch llava_jax
}

send() {
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "build/$NAME.tar.gz" "$node:llava_jax.tar.gz" --zone="$ZONE" --worker=all --quiet \
      --strict-host-key-checking=no || return 1
  done
  on_all_workers "mkdir -p llava_jax && cd llava_jax && rm -rf configs launch llava_jax && \
tar -xzf ../llava_jax.tar.gz && launch/worker.sh install${SETUP:+ && bash -c ${SETUP@Q}}"
}

install() { pack && send; }

# ---- the run ----------------------------------------------------------------------------------------------------

train() { on_all_workers "llava_jax/launch/worker.sh start $CHIP ${*@Q}"; }

stop() { on_all_workers "llava_jax/launch/worker.sh stop"; }

# logs [WORKER]: follows one worker of the first node; `all` copies the log of every worker.
logs() {
  local node command
  for node in $(nodes); do
    if [[ ${1:-0} == all ]]; then
      run mkdir -p "logs/$node"
      remote "$node" all "cat llava_jax_run/train.log" --output-directory="logs/$node"
      run "${command[@]}"
    else
      remote "$node" "${1:-0}" "tail -n 100 -F llava_jax_run/train.log"
      become "${command[@]}"
      return
    fi
  done
}

status() {
  local state
  state=$(node_state "$READY")
  dry || echo "$NAME: $state"
  on_all_workers "llava_jax/launch/worker.sh state"
}

# worker_states ASSUMED: a line per worker (worker.sh state); fails unless every worker answers.
worker_states() {
  local node command states
  states=$(for node in $(nodes); do
    remote "$node" all "llava_jax/launch/worker.sh state"
    ask "llava_jax worker $node: $1" "${command[@]}" 2>/dev/null </dev/null
  done | sed -n 's/^llava_jax worker [^ ]*: //p') || return 1
  printf '%s\n' "$states"
  dry || (($(wc -l <<<"$states") == VMS * SLICES))
}

# verdict STATES: running, stopped, done, again, or the exit code that ends the run for good. 42 is a SIGTERM after which
# the state is saved, 43 a worker that was stuck, 44 one that lost another, 128 and above a signal, such as its abort.
verdict() {
  local state word="done"
  [[ $1 != *running* && $1 != *stopping* ]] || { echo running && return; }
  [[ $1 != *stopped* ]] || { echo stopped && return; }
  while read -r state; do
    case $state in
      "exit 0") ;;
      gone | none | exit\ 4[234] | exit\ 1[3-9][0-9] | exit\ 12[89] | exit\ 2[0-9][0-9]) word=again ;;
      *) echo "${state#exit }" && return ;;
    esac
  done <<<"$1"
  echo "$word"
}

# ---- babysit ----------------------------------------------------------------------------------------------------

# Makes sure that node, package and run exist; keeps what exists. Fails when the node does not come up.
bring_up() {
  local state states tries
  state=$(node_state MISSING)
  while [[ $state == DELETING ]]; do pause && state=$(node_state MISSING); done
  case " $READY $PENDING UNKNOWN " in
    *" $state "*) ;;
    *)
      [[ $state == MISSING ]] || { say "state $state: deleting" && delete_node; }
      create_node || return 1
      ;;
  esac
  wait_ready || return 1
  if states=$(worker_states none) && [[ $states == *running* ]]; then
    say "a run is in progress"
    return 0
  fi
  for tries in 1 2 3; do
    send && train "$@" && return 0
    say "attempt $tries of 3 to install and start failed (a new node may need a minute until it answers)"
    pause
  done
  return 1
}

# Watches a run until it ends: sets `outcome` to a verdict, or to lost.
watch_run() {
  local states silent=0
  while true; do
    pause
    case $(node_state "$READY") in
      "$READY") ;;
      UNKNOWN) continue ;;
      *) outcome=lost && return ;;
    esac
    if states=$(worker_states "exit 0"); then
      silent=0 outcome=$(verdict "$states")
      [[ $outcome == running ]] || break
    else
      silent=$((silent + 1))
      say "not every worker answers ($silent of $PATIENCE times in a row)"
      ((silent < PATIENCE)) || { outcome=lost && return; }
    fi
  done
  # An error on one worker can be the first sign that another is being preempted.
  if [[ $outcome =~ ^[0-9]+$ ]]; then
    pause
    [[ $(node_state "$READY") == "$READY" ]] || outcome=lost
  fi
}

babysit() {
  local tries outcome
  pack # once: a restart runs the same code
  for ((tries = 0; tries <= RESTARTS; tries++)); do
    if bring_up "$@"; then watch_run; else outcome=lost; fi
    case $outcome in
      done) say "done" && return 0 ;;
      stopped) say "stopped; the same command resumes from here" && return 42 ;;
      again) say "a worker was interrupted (restarts so far: $tries of $RESTARTS)" ;;
      lost) say "the node is lost (restarts so far: $tries of $RESTARTS)" ;;
      *) say "train ended with exit code $outcome and is not restarted: see '$0 logs $NAME all'" && return "$outcome" ;;
    esac
    if [[ $outcome == lost ]]; then delete_node || true; fi
  done
  say "giving up after $RESTARTS restarts"
  return 1
}

# ---- the command line -------------------------------------------------------------------------------------------

main() {
  local verb=${1:---help}
  [[ $verb != --help ]] || usage
  NAME=${2:-} POLL=${POLL:-60}
  case $verb in
    create | install | train | logs | status | stop | delete | babysit) ;;
    *) fail "no verb '$verb': create, install, train, logs, status, stop, delete or babysit" ;;
  esac
  [[ -n $NAME ]] || fail "$verb: no NAME given"
  check_name "$NAME"
  [[ -n ${ZONE:-} ]] || fail "ZONE is not set: give the zone of the TPU, such as ZONE=us-west4-a"
  check_count POLL
  read_topology
  # shellcheck disable=SC2034 # of create_node
  read -ra create_flags <<<"${CREATE_FLAGS:-} ${SPOT:+--spot}"
  case $verb in
    train | babysit) check_train "${@:3}" && "$verb" "${@:3}" ;;
    logs) logs "${@:3}" ;;
    delete) delete_node ;;
    *) "$verb" ;;
  esac
}

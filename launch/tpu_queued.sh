#!/usr/bin/env bash
# Training on TPU slices from the queue (queued resources): waits for free chips, for one slice or several.
#
#   export ZONE=us-west4-a TOPOLOGY=v5e:8x8         chip:shape as `llava-jax compile` takes it
#   launch/tpu_queued.sh create  NAME               and waits until it is active
#   launch/tpu_queued.sh install NAME               copies this folder to all workers and installs it there
#   launch/tpu_queued.sh train   NAME CONFIG WORKDIR [--config.key=value …]     on all workers, detached
#   launch/tpu_queued.sh babysit NAME CONFIG WORKDIR [--config.key=value …]     all of these, again after a preemption
#   launch/tpu_queued.sh logs    NAME [WORKER]      follows worker 0; `all` copies every worker's log to logs/
#   launch/tpu_queued.sh status  NAME
#   launch/tpu_queued.sh stop    NAME               SIGTERM: saves; the same `train` resumes
#   launch/tpu_queued.sh delete  NAME
#
# WORKDIR, the data and the weights are on a disk that all workers mount and that outlives the node.
# SLICES=1 · SPOT=1 cheaper, can be preempted · CREATE_FLAGS='--network=… --reserved' more flags of gcloud's create
# SETUP='mountpoint -q /data || sudo mount …' run on every worker after each installation
# RESTARTS=10 and POLL=60 (seconds) of babysit
# DRY_RUN=1 prints every command and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
. launch/tpu.sh

READY=ACTIVE PENDING="ACCEPTED PROVISIONING CREATING WAITING_FOR_RESOURCES"

nodes() { if ((SLICES == 1)); then echo "$NAME"; else seq -f "$NAME-%.0f" 0 $((SLICES - 1)); fi; }

create_node() {
  local names=(--node-id="$NAME")
  ((SLICES == 1)) || names=(--node-count="$SLICES" --node-prefix="$NAME")
  run gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" "${names[@]}" --quiet "${create_flags[@]}"
}

# --force: the nodes as well.
delete_node() { run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet; }

describe() { command=(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format="value(state.state)"); }

main "$@"

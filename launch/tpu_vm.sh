#!/usr/bin/env bash
# Training on a Cloud TPU VM slice, created at once or refused. For the queue, or several slices: tpu_queued.sh.
#
#   export ZONE=us-west4-a TOPOLOGY=v5e:8x8     chip:shape as `llava-jax compile` takes it
#   launch/tpu_vm.sh create  NAME               and waits until it is ready
#   launch/tpu_vm.sh install NAME               copies this folder to all workers and installs it there
#   launch/tpu_vm.sh train   NAME CONFIG WORKDIR [--config.key=value …]     on all workers, detached
#   launch/tpu_vm.sh babysit NAME CONFIG WORKDIR [--config.key=value …]     all of these, again after a preemption
#   launch/tpu_vm.sh logs    NAME [WORKER]      follows worker 0; `all` copies every worker's log to logs/
#   launch/tpu_vm.sh status  NAME
#   launch/tpu_vm.sh stop    NAME               SIGTERM: saves; the same `train` resumes
#   launch/tpu_vm.sh delete  NAME
#
# WORKDIR, the data and the weights are on a disk that all workers mount and that outlives the node.
# SPOT=1 cheaper, can be preempted · CREATE_FLAGS='--network=… --reserved' more flags of gcloud's create
# SETUP='mountpoint -q /data || sudo mount …' run on every worker after each installation
# RESTARTS=10 and POLL=60 (seconds) of babysit
# DRY_RUN=1 prints every command and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
. launch/tpu.sh

READY=READY PENDING="CREATING STARTING RESTARTING REPAIRING"

nodes() { echo "$NAME"; }

create_node() {
  ((SLICES == 1)) || fail "SLICES=$SLICES: a TPU VM is one slice; tpu_queued.sh takes several"
  run gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" \
    --quiet "${create_flags[@]}"
}

delete_node() { run gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet; }

describe() { command=(gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format="value(state)"); }

main "$@"

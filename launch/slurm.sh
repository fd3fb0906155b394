#!/usr/bin/env bash
# Training on the GPUs of a Slurm cluster: one process per GPU.
#
#   launch/slurm.sh CONFIG WORKDIR [--config.key=value …]
#   NODES=2 GPUS=8 TIME=12:00:00 launch/slurm.sh configs/llava_v1_5.py:size=7b,stage=finetune /data/runs/finetune
#
# Run it where `python -m llava_jax` works; WORKDIR, the data and the weights are on a file system that all nodes share.
# NODES=1 · GPUS=8 and CPUS=8 (per GPU) of each node · TIME=24:00:00 · GRACE=300 seconds before TIME to save and queue
# again · RESTARTS=20 · LOGS=logs, one file per process · SBATCH_PARTITION, SBATCH_ACCOUNT and others as sbatch has them
# Preempted or out of time, the job is requeued and resumes from its checkpoint. `scancel JOB` stops it for good.
# DRY_RUN=1 prints the commands and runs none.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"
[[ ${1:---help} != --help ]] || usage
check_train "$@"
NODES=${NODES:-1} GPUS=${GPUS:-8} CPUS=${CPUS:-8} TIME=${TIME:-24:00:00} GRACE=${GRACE:-300} LOGS=${LOGS:-logs}
export RESTARTS=${RESTARTS:-20} LOGS
for count in NODES GPUS CPUS GRACE RESTARTS; do check_count "$count"; done
run mkdir -p "$LOGS"
run sbatch --job-name=llava_jax --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" \
  --cpus-per-task="$CPUS" --time="$TIME" --signal="TERM@$GRACE" --requeue --open-mode=append --output="$LOGS/%j.log" \
  "$root/launch/slurm.sbatch" "$root" "$@"

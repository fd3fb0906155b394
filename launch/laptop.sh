#!/usr/bin/env bash
# One training stage on this machine's CPU: launch/laptop.sh configs/tiny.py:stage=pretrain runs/pretrain [--config.key=value …]
set -euo pipefail
export JAX_PLATFORMS=cpu
exec python -m llava_jax train --config="$1" --workdir="$2" "${@:3}"

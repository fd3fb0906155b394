#!/usr/bin/env bash
# One training stage on this machine's CPU.
#
#   launch/laptop.sh CONFIG WORKDIR [--config.key=value …]
#   launch/laptop.sh configs/tiny.py:stage=pretrain runs/pretrain --config.data.annotations=FILE --config.data.images=DIR
#
# DRY_RUN=1 prints the command and runs nothing.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
[[ ${1:---help} != --help ]] || usage
check_train "$@"
become env JAX_PLATFORMS=cpu python -m llava_jax train --config="$1" --workdir="$2" "${@:3}"

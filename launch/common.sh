# shellcheck shell=bash
# What the scripts of this folder share; sourced by them.
exec 3>&1 # where a dry run prints, also from inside $(…)

dry() { [[ ${DRY_RUN:-0} == 1 ]]; }

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the head of the script.
usage() {
  sed -n -e '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# The words as one line that a shell reads back as the same words; quotes only where they are needed.
quote() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or later is needed, this is $BASH_VERSION"
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  printf '%s\n' "${words[*]}"
}

# Runs a command; with DRY_RUN=1 prints it.
run() { if dry; then quote "$@" >&3; else "$@"; fi; }

# The same in place of this script, so that signals reach the command.
become() { if dry; then quote "$@" >&3; else exec "$@"; fi; }

# ask ANSWER COMMAND…: what the command prints; with DRY_RUN=1 shows the command and takes ANSWER for it.
ask() { if dry; then quote "${@:2}" >&3 && printf '%s\n' "$1"; else "${@:2}"; fi; }

check_name() { [[ $1 =~ ^[a-z][-a-z0-9]{0,38}[a-z0-9]$ ]] || fail "name '$1': 2 to 40 of a-z, 0-9 and -, a letter first"; }

check_train() { (($# >= 2)) || fail "CONFIG and WORKDIR are missing: as in configs/llava_v1_5.py:stage=finetune /data/runs/finetune"; }

check_count() { [[ ${!1} =~ ^(0|[1-9][0-9]{0,3})$ ]] || fail "$1='${!1}': expected a whole number up to 9999"; }

# Reads TOPOLOGY, chip:shape as `compile` takes it, into CHIP SHAPE CHIPS VMS CHIPS_PER_VM, and what Google calls them:
# ACCELERATOR (gcloud, xpk), RUNTIME (image of a TPU VM), GKE_ACCELERATOR (node label).
# shellcheck disable=SC2034 # read by the scripts that source this one
read_topology() {
  local given=${TOPOLOGY:-}
  [[ $given == *:* ]] || fail "TOPOLOGY='$given': give chip:shape, such as TOPOLOGY=v5e:8x8"
  CHIP=${given%%:*} SHAPE=${given#*:}
  case $given in
    v5e:1x1 | v5e:2x2 | v5e:2x4 | v5e:4x4 | v5e:4x8 | v5e:8x8 | v5e:8x16 | v5e:16x16) ;;
    v6e:1x1 | v6e:2x2 | v6e:2x4 | v6e:4x4 | v6e:4x8 | v6e:8x8 | v6e:8x16 | v6e:16x16) ;;
    v5p:2x2x1 | v5p:2x2x2 | v5p:2x2x4 | v5p:2x4x4 | v5p:4x4x4 | v5p:4x4x8) ;;
    v5p:4x8x8 | v5p:8x8x8 | v5p:8x8x16 | v5p:8x16x16 | v5p:16x16x16) ;;
    *) fail "TOPOLOGY='$given': expected v5e or v6e with 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16, or v5p with 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16" ;;
  esac
  CHIPS=$((${SHAPE//x/*}))
  # Machines have 4 chips, but for the smallest slices, which are one machine.
  case $SHAPE in 1x1) CHIPS_PER_VM=1 ;; 2x4) CHIPS_PER_VM=8 ;; *) CHIPS_PER_VM=4 ;; esac
  VMS=$((CHIPS / CHIPS_PER_VM))
  case $CHIP in
    v5e) ACCELERATOR=v5litepod-$CHIPS RUNTIME=v2-alpha-tpuv5-lite GKE_ACCELERATOR=tpu-v5-lite-podslice ;;
    v6e) ACCELERATOR=v6e-$CHIPS RUNTIME=v2-alpha-tpuv6e GKE_ACCELERATOR=tpu-v6e-slice ;;
    v5p) ACCELERATOR=v5p-$((2 * CHIPS)) RUNTIME=v2-alpha-tpuv5 GKE_ACCELERATOR=tpu-v5p-slice ;; # counts cores
  esac
  SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-10}
  check_count SLICES
  check_count RESTARTS
  ((SLICES >= 1)) || fail "SLICES='$SLICES': expected 1 or more"
}

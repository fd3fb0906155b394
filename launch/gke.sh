#!/usr/bin/env bash
# Training on TPU slices of a GKE cluster: a JobSet (launch/jobset.yaml) through kubectl, or a workload of xpk.
#
#   export TOPOLOGY=v5e:8x8 IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/llava_jax     an image of launch/Dockerfile
#   launch/gke.sh render NAME CONFIG WORKDIR [--config.key=value …]     prints the manifest
#   launch/gke.sh submit NAME CONFIG WORKDIR [--config.key=value …]     kubectl; a volume claim CLAIM is at /data,
#                                                                       a WORKDIR at gs:// needs none
#   launch/gke.sh xpk    NAME CONFIG WORKDIR [--config.key=value …]     xpk, on its cluster CLUSTER, with STORAGE
#   launch/gke.sh logs   NAME                                           follows worker 0 of slice 0
#   launch/gke.sh status NAME
#   launch/gke.sh stop   NAME                                           SIGTERM: saves; the same `submit` resumes
#
# It restarts by itself, at most RESTARTS=10 times, when a worker is preempted.
# SLICES=1 · SPOT=1 cheaper, can be preempted · GRACE=300 seconds to save · CLAIM, CLUSTER, STORAGE: names, no default
# DRY_RUN=1 prints every command and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

# Kubernetes replaces $(NAME) in a command; $$ stands for $.
escape() { printf '%s\n' "${1//\$/\$\$}"; }

# A word as a double-quoted YAML string.
yaml() {
  [[ $1 != *[[:cntrl:]]* ]] || fail "argument ${1@Q}: control characters cannot be passed"
  local word
  word=$(escape "$1")
  word=${word//\\/\\\\}
  printf '"%s"' "${word//\"/\\\"}"
}

# shellcheck disable=SC2034 # read through their names
render() {
  local text word args=""
  for word in --config="$1" --workdir="$2" "${@:3}"; do
    word=$(yaml "$word") || exit
    args+=$'\n                    - '$word
  done
  SPOT_SELECTOR=${SPOT:+$'\n                cloud.google.com/gke-spot: "true"'}
  SPOT_TOLERATION=${SPOT:+$'\n                - key: cloud.google.com/gke-spot\n                  operator: Exists'}
  RESTART_CODES=42$(printf ', %s' 43 44 {128..255})
  text=$(<launch/jobset.yaml)
  CACHE=/data/compilation_cache
  if [[ -z ${CLAIM:=} ]]; then # the workdir is in a bucket
    text=$(sed -e '/^ *volumeMounts:/,/mountPath:/d' -e '/^ *volumes:/,$d' <<<"$text")
    CACHE=$(yaml "${2%/}/compilation_cache") || exit
  fi
  for word in NAME RESTARTS SLICES VMS RESTART_CODES GRACE GKE_ACCELERATOR SHAPE SPOT_SELECTOR SPOT_TOLERATION IMAGE \
    CHIP CHIPS_PER_VM CACHE CLAIM; do
    text=${text//"@$word@"/"${!word}"}
  done
  printf '%s\n' "${text//"@ARGS@"/"$args"}" # last: they may hold anything
}

submit() {
  local manifest
  manifest=$(render "$@") || exit
  run mkdir -p build
  if dry; then
    quote launch/gke.sh render "$NAME" "$@" | sed "s|\$| >build/$NAME.yaml|"
  else
    printf '%s\n' "$manifest" >"build/$NAME.yaml"
  fi
  run kubectl create -f "build/$NAME.yaml"
}

xpk() {
  local train
  train=$(escape ". launch/env/$CHIP.sh && exec python -m llava_jax train $(quote --config="$1" --workdir="$2" "${@:3}")")
  become xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" \
    --docker-image="$IMAGE" --max-restarts="$RESTARTS" --termination-grace-period-seconds="$GRACE" \
    ${SPOT:+--spot} ${STORAGE:+--storage="$STORAGE"} --command="$train"
}

set_or_fail() { [[ -n ${!1:-} ]] || fail "$1 is not set: $2"; }

verb=${1:---help} NAME=${2:-} GRACE=${GRACE:-300}
[[ $verb != --help ]] || usage
case $verb in
  render | submit | xpk | logs | status | stop) ;;
  *) fail "no verb '$verb': render, submit, xpk, logs, status or stop" ;;
esac
[[ -n $NAME ]] || fail "$verb: no NAME given"
check_name "$NAME"
selector=jobset.sigs.k8s.io/jobset-name=$NAME
case $verb in
  logs) become kubectl logs -f --tail=100 -l "$selector,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" ;;
  status)
    run kubectl get jobset "$NAME"
    run kubectl get pods -l "$selector" -o wide
    ;;
  stop) run kubectl delete jobset "$NAME" ;;
  *)
    check_train "${@:3}"
    check_count GRACE
    set_or_fail IMAGE "the image that launch/Dockerfile makes"
    read_topology
    if [[ $verb == xpk ]]; then
      set_or_fail CLUSTER "the cluster that xpk made"
    elif [[ $4 != gs://* ]]; then
      set_or_fail CLAIM "the volume claim with the data, the weights and the workdir, which is mounted at /data; none is needed with a WORKDIR at gs://"
    fi
    "$verb" "${@:3}"
    ;;
esac

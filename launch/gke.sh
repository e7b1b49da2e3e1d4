#!/usr/bin/env bash
# A run on a GKE cluster of TPUs, TPU7x among them, or GPUs: one `gcluster job submit`.
#
# The cluster is one that Cluster Toolkit made. Its job set starts the pods again when a node is
# taken away or the run stops short, and main resumes from the bucket. --dry-run prints the command,
# quoted so that it can be pasted. Runs on bash 3.2 (macOS) and newer. Page: docs/tpu.md.
set -euo pipefail

readonly program=gke.sh
# shellcheck source=launch/command_line.sh
. "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

synopsis() {
  cat <<'TEXT'
usage: gke.sh --name NAME --cluster CLUSTER --location PLACE --project PROJECT
              --compute-type TYPE --image IMAGE --config FILE --workdir gs://... [options]
TEXT
}

help() {
  synopsis
  cat <<'TEXT'

options
  --name NAME            of the job
  --cluster CLUSTER      of Cluster Toolkit
  --location PLACE       its region or zone, for example us-central1
  --project PROJECT      the Google Cloud project that pays
  --compute-type TYPE    for example v6e-16; tpu7x-8 counts cores, two a chip
  --topology SHAPE       where the type leaves it open, for example 2x2x4
  --slices N             slices of that type (default 1)
  --image IMAGE          with this repository installed in it (launch/Dockerfile)
  --config FILE[:ARG]    a config of the image, for example configs/sdxl.py
  --workdir gs://...     where checkpoints, metrics and the report go; main sees the bucket as
                         the folder /gcs/BUCKET
  --restarts N           how often the job set begins again (default 100)
  --queue QUEUE          Kueue's local queue
  --dry-run              print the command and do nothing
  -- ARGS                passed on to tlcm_jax.main
TEXT
}

name='' cluster='' location='' project='' compute_type='' topology='' slices=1 image=''
config='' workdir='' restarts=100 queue='' dry_run=false
main_args=()
while (($# > 0)); do
  flag=$1
  shift
  case $flag in
    --dry-run) dry_run=true && continue ;;
    --help | -h | help)
      help
      exit 0
      ;;
    --)
      main_args=("$@")
      break
      ;;
    --*=*)
      value=${flag#*=}
      flag=${flag%%=*}
      ;;
    --*)
      (($# > 0)) || misuse "$flag has no value: write $flag VALUE"
      value=$1
      shift
      ;;
    *) misuse "unexpected '$flag': options begin with --, and what follows -- goes to main" ;;
  esac
  case $flag in
    --name) name=$value ;;
    --cluster) cluster=$value ;;
    --location) location=$value ;;
    --project) project=$value ;;
    --compute-type) compute_type=$value ;;
    --topology) topology=$value ;;
    --slices) slices=$value ;;
    --image) image=$value ;;
    --config) config=$value ;;
    --workdir) workdir=$value ;;
    --restarts) restarts=$value ;;
    --queue) queue=$value ;;
    *) misuse "unknown option $flag: see $program --help" ;;
  esac
done

check --name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-run
check --cluster "$cluster" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' my-cluster
check --location "$location" '[a-z]+-[a-z]+[0-9]+(-[a-z])?' us-central1
check --project "$project" '([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]' my-project
check --compute-type "$compute_type" '[a-z0-9][-a-z0-9]*' tpu7x-8
[[ -z $topology ]] || check --topology "$topology" '[0-9]+(x[0-9]+){1,2}' 2x2x4
check --slices "$slices" '[1-9][0-9]{0,3}' 1
check --image "$image" '[^[:space:]]+' us-docker.pkg.dev/my-project/my-repository/tlcm:1
check --config "$config" '[^/].*\.py(:.*)?' configs/sdxl.py
check --workdir "$workdir" 'gs://[a-z0-9][-_.a-z0-9]+/.+' gs://my-bucket/runs/sdxl
check --restarts "$restarts" '[0-9]{1,5}' 100
[[ -z $queue ]] || check --queue "$queue" '[a-z0-9][-a-z0-9]*' my-queue

bucket=${workdir#gs://}
bucket=${bucket%%/*}
# The pod's shell reads it: quoted once more.
run="python -u -m tlcm_jax.main$(printf ' %q' "--config=$config" \
  "--workdir=/gcs/${workdir#gs://}" ${main_args[@]+"${main_args[@]}"})"
# One worker must see at once what another has written; a folder is renamed whole.
options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
command=(gcluster job submit --name "$name" --cluster "$cluster" --location "$location"
  --project "$project" --compute-type "$compute_type" --num-slices "$slices" --image "$image"
  --restarts "$restarts" --mount "gs://$bucket;/gcs/$bucket;rw;options=$options")
[[ -z $topology ]] || command+=(--topology "$topology")
[[ -z $queue ]] || command+=(--queue "$queue")
command+=(--command "$run")

if $dry_run; then
  printf '%q' "${command[0]}"
  printf ' %q' "${command[@]:1}"
  printf '\n'
  exit 0
fi
type -P gcluster >/dev/null ||
  die 'gcluster is not on PATH: install Cluster Toolkit, or add --dry-run to see the command'
exec "${command[@]}"

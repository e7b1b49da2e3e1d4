#!/usr/bin/env bash
# One Cloud TPU slice from request to deletion: create, setup, run, keep, logs, status, stop, delete.
#
# Every command is plain gcloud; --dry-run prints them, quoted so that they can be pasted, and
# calls nothing. Runs on bash 3.2 (macOS) and newer. Page: docs/tpu.md.
set -euo pipefail

readonly program=tpu_slice.sh
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
# The remote scripts leave with this status when trying again cannot help.
readonly refused=3
# shellcheck source=launch/command_line.sh
. "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

synopsis() {
  cat <<'TEXT'
usage: tpu_slice.sh COMMAND --name NAME --zone ZONE --project PROJECT [options]
TEXT
}

help() {
  synopsis
  cat <<'TEXT'

commands
  create   request the slice as a queued resource and wait until it is active
  setup    copy the last commit to every worker and install it there, with jax[tpu]
  run      start tlcm_jax.main on every worker; it goes on when this terminal closes
  keep     create, setup and run, and all of it again whenever the slice is taken away or the run
           stops short, until it is finished; takes the options of the three
  logs     print a worker's log
  status   the slice's state, and what each worker is doing
  stop     end the run on every worker; the slice stays (and costs)
  delete   delete the slice, after naming it and asking

options
  --name NAME            the slice, its queued resource and its node
  --zone ZONE            for example us-west4-a
  --project PROJECT      the Google Cloud project that pays
  --accelerator TYPE     create, keep: for example v5litepod-16
  --version RUNTIME      create: the TPU software version (default: by accelerator)
  --spot                 create, keep: a spot slice, cheaper, may be taken away
  --wait MINUTES         create: how long to wait for the slice (default 120; 0: do not wait)
  --poll SECONDS         create: time between looks at the queue (default 20)
  --config FILE[:ARG]    run, keep: a config of the last commit, for example configs/sdxl.py
  --workdir gs://...     run, keep: where checkpoints, metrics and the report go; main sees the
                         bucket as the folder /gcs/BUCKET
  --worker N|all         logs: which worker (default 0)
  --lines N              logs: how many lines (default 100)
  --follow               logs: keep printing
  --watch SECONDS        keep: time between looks at the run (default 60)
  --delete               keep: delete the slice when the run is finished
  --retries N            tries again after a failure (default 3)
  --retry-delay SECONDS  pause before the first of them, growing each time (default 15)
  --yes                  delete: do not ask
  --dry-run              print the gcloud commands and do nothing
  -- ARGS                run, keep: passed on to tlcm_jax.main
TEXT
}

# ---------------------------------------------------------------- command line

name='' zone='' project='' accelerator='' version='' config='' workdir=''
worker=0 lines=100 follow=false spot=false yes=false dry_run=false delete_after=false
retries=3 retry_delay=15 wait_minutes=120 poll=20 watch=60
main_args=()

command=${1-}
case $command in
  create | setup | run | keep | logs | status | stop | delete) shift ;;
  help | -h | --help)
    help
    exit 0
    ;;
  '') misuse 'no command: begin with create, setup, run, keep, logs, status, stop or delete' ;;
  *) misuse "unknown command '$command': use create, setup, run, keep, logs, status, stop or delete" ;;
esac

while (($# > 0)); do
  flag=$1
  shift
  case $flag in
    --spot) spot=true && continue ;;
    --follow) follow=true && continue ;;
    --yes) yes=true && continue ;;
    --delete) delete_after=true && continue ;;
    --dry-run) dry_run=true && continue ;;
    --help | -h)
      help
      exit 0
      ;;
    --)
      main_args=("$@")
      break
      ;;
  esac
  # All the others take a value: --flag VALUE or --flag=VALUE.
  case $flag in
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
    --zone) zone=$value ;;
    --project) project=$value ;;
    --accelerator) accelerator=$value ;;
    --version) version=$value ;;
    --config) config=$value ;;
    --workdir) workdir=$value ;;
    --worker) worker=$value ;;
    --lines) lines=$value ;;
    --retries) retries=$value ;;
    --retry-delay) retry_delay=$value ;;
    --wait) wait_minutes=$value ;;
    --poll) poll=$value ;;
    --watch) watch=$value ;;
    *) misuse "unknown option $flag: see $program --help" ;;
  esac
done

check --name "$name" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' my-slice
check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' us-west4-a
check --project "$project" '([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]' my-project
check --retries "$retries" '[0-9]{1,3}' 3
check --retry-delay "$retry_delay" '[0-9]{1,4}' 15
check --wait "$wait_minutes" '[0-9]{1,5}' 120
check --poll "$poll" '[0-9]{1,4}' 20
check --lines "$lines" '[0-9]{1,9}' 100
check --worker "$worker" '[0-9]{1,4}|all' 0
check --watch "$watch" '[0-9]{1,5}' 60
if ((${#main_args[@]} > 0)) && [[ $command != run && $command != keep ]]; then
  misuse "arguments after -- are for run and keep only: leave them out of $command"
fi
[[ $command == logs && $follow == true && $worker == all ]] &&
  misuse '--follow reads one worker: choose one with --worker 0'
$dry_run || type -P gcloud >/dev/null ||
  die 'gcloud is not on PATH: install the Google Cloud CLI, or add --dry-run to see the commands'

slice="TPU slice $name in $zone of project $project"
where=(--zone="$zone" --project="$project")
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

# ---------------------------------------------------------------- running gcloud

# Runs a command, or prints it under --dry-run.
execute() {
  if $dry_run; then
    printf '%q' "$1"
    shift
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# retry WHAT COMMAND...: tries again with a growing pause, unless the worker itself refused.
retry() {
  local what=$1 attempt=0 status pause
  shift
  while true; do
    status=0
    execute "$@" || status=$?
    ((status == 0)) && return 0
    ((status == refused)) && return "$refused"
    ((attempt < retries)) || break
    attempt=$((attempt + 1))
    pause=$((retry_delay * attempt))
    say "$what failed with status $status: try $attempt of $retries in $pause s"
    sleep "$pause"
  done
  say "$what failed with status $status: see gcloud's message above, then run the same command"
  return "$status"
}

# on_workers WHAT WORKER SCRIPT: runs a shell script over ssh.
on_workers() {
  retry "$1" "${vm[@]}" ssh "$name" "${where[@]}" --worker="$2" --quiet --command="$3"
}

# Prints "STATE ACCELERATOR" of the queued resource, or nothing when there is none.
queue_state() {
  local answer attempt=0
  # The message is read to tell "there is none" from a failure, so stderr is captured too.
  until answer=$("${queue[@]}" describe "$name" "${where[@]}" \
    --format='value(state.state,tpu.nodeSpec[0].node.acceleratorType)' 2>&1); do
    case $answer in *NOT_FOUND* | *'was not found'*) return 0 ;; esac
    ((attempt < retries)) || die "cannot look at $slice: $answer"
    attempt=$((attempt + 1))
    sleep "$((retry_delay * attempt))"
  done
  # gcloud may print notices first; the values are the last line.
  printf '%s\n' "${answer##*$'\n'}" | tr '\t' ' '
}

# ---------------------------------------------------------------- commands

default_version() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) misuse "no software version is known for $1: add --version RUNTIME" ;;
  esac
}

create() {
  check --accelerator "$accelerator" 'v[0-9]+[a-z]*-[0-9]+' v5litepod-16
  [[ -n $version ]] || version=$(default_version "$accelerator") || exit 2
  check --version "$version" '[a-z][-.a-z0-9]*' v2-alpha-tpuv5-lite
  local request=("${queue[@]}" create "$name" "${where[@]}" --node-id="$name"
    --accelerator-type="$accelerator" --runtime-version="$version" --quiet)
  if $spot; then request+=(--spot); fi
  local clear=("${queue[@]}" delete "$name" "${where[@]}" --force --quiet)
  if $dry_run; then
    execute "${request[@]}"
    execute "${queue[@]}" describe "$name" "${where[@]}" \
      '--format=value(state.state,tpu.nodeSpec[0].node.acceleratorType)'
    return
  fi

  local answer state had previous='' renewed=0 end=$((SECONDS + 60 * wait_minutes))
  while true; do
    answer=$(queue_state) || exit 1
    read -r state had <<<"$answer" || true
    [[ -z ${had-} || $had == "$accelerator" ]] ||
      die "$slice exists as $had, not $accelerator: choose another --name, or delete it first"
    [[ $state == "$previous" ]] || say "$slice: ${state:-not there yet}"
    previous=$state
    case $state in
      '') retry "requesting $name" "${request[@]}" || exit 1 ;;
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED)
        # Such a request has lost its TPUs, but its name blocks a new one.
        ((renewed < retries)) ||
          die "$slice is $state: another --zone, --accelerator or no --spot may be had sooner"
        renewed=$((renewed + 1))
        say "deleting the $state request of $slice, to ask again ($renewed of $retries)"
        retry "deleting the request $name" "${clear[@]}" || exit 1
        sleep "$((retry_delay * renewed))"
        continue
        ;;
    esac
    if ((wait_minutes == 0)) && [[ -n $state ]]; then return 0; fi
    ((wait_minutes == 0)) && continue
    ((SECONDS < end)) ||
      die "$slice is still ${state:-on its way} after $wait_minutes min and stays queued:" \
        "run the same command to go on waiting, or delete to give up"
    sleep "$poll"
  done
}

# Shell functions for the workers. A process counts as the run only while its command line says
# so: after a reboot the number in run.pid may belong to anything.
remote_functions() {
  cat <<'SCRIPT'
set -eu
pid=$(cat ~/tlcm/run.pid 2>/dev/null || echo none)
id=$(cat ~/tlcm/run.id 2>/dev/null || echo none)
alive() { grep -qsa tlcm_jax.main "/proc/$pid/cmdline"; }
tell() { echo "$(hostname): $*"; }
SCRIPT
}

setup() {
  git -C "$root" rev-parse --quiet --verify HEAD >/dev/null ||
    die "$root is not a git clone: the workers are given its last commit, so clone it"
  [[ -z $(git -C "$root" status --porcelain) ]] ||
    say 'there are uncommitted changes: the workers get the last commit, without them'
  local archive=/tmp/tlcm_jax.tar.gz
  if ! $dry_run; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    archive=$scratch/tlcm_jax.tar.gz
  fi
  execute git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  retry 'copying the code' "${vm[@]}" scp "$archive" "$name:tlcm_jax.tar.gz" "${where[@]}" \
    --worker=all --quiet
  # The images carry Python 3.10, so uv brings a newer one. gcsfuse comes from Google's own
  # package archive. The last line is the proof: it returns only when the runtimes of all workers
  # have found one another.
  on_workers 'installing' all "$(
    remote_functions
    cat <<SCRIPT
if alive; then tell "a run is going on, \$id: end it with stop first" >&2; exit $refused; fi
SCRIPT
    cat <<'SCRIPT'
rm -rf ~/tlcm/source.new && mkdir -p ~/tlcm/source.new
tar -xzf ~/tlcm_jax.tar.gz -C ~/tlcm/source.new
rm -rf ~/tlcm/source && mv ~/tlcm/source.new ~/tlcm/source
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv
python3 -m uv venv --quiet --clear --python 3.12 ~/tlcm/venv
python3 -m uv pip install --quiet --python ~/tlcm/venv/bin/python \
  -e ~/tlcm/source 'jax[tpu]'
if ! command -v gcsfuse >/dev/null; then
  archive=https://packages.cloud.google.com/apt
  curl -fsS "$archive/doc/apt-key.gpg" | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] $archive gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 install gcsfuse >/dev/null
fi
~/tlcm/venv/bin/python -c 'import jax; jax.distributed.initialize(); print(
  f"worker {jax.process_index()} of {jax.process_count()}: jax {jax.__version__},",
  f"{jax.local_device_count()} of {jax.device_count()} {jax.devices()[0].device_kind} chips")'
SCRIPT
  )"
}

run() {
  check --config "$config" '[^/].*\.py(:.*)?' configs/sdxl.py
  check --workdir "$workdir" 'gs://[a-z0-9][-_.a-z0-9]+/.+' gs://my-bucket/runs/sdxl
  git -C "$root" cat-file -e "HEAD:${config%%:*}" 2>/dev/null ||
    misuse "--config ${config%%:*} is not in the last commit: give a path from the" \
      "repository's root, and commit it"
  local main started bucket=${workdir#gs://}
  bucket=${bucket%%/*}
  started="$(date -u +%Y-%m-%dT%H:%M:%SZ) $workdir (no. $$)"
  # It stands between single quotes in the remote script, and is only read by people.
  started=${started//[^A-Za-z0-9 _.:()\/=+-]/_}
  main=$(printf ' %q' "--config=$config" "--workdir=/gcs/${workdir#gs://}" ${main_args[@]+"${main_args[@]}"})
  # The bucket is mounted as a folder, because a run appends to its files and renames them. No
  # cache may outlive a call: the workers must see one another's files at once.
  # The id makes starting safe to repeat: a worker that has begun this very run says so, and
  # only those that a broken connection left out begin now.
  on_workers 'starting the run' all "$(
    remote_functions
    cat <<SCRIPT
new='$started'
if alive && [ "\$id" = "\$new" ]; then tell started; exit 0; fi
if alive; then tell "a run is going on, \$id: end it with stop first" >&2; exit $refused; fi
if [ ! -x ~/tlcm/venv/bin/python ]; then tell 'not installed: run setup first' >&2; exit $refused; fi
if ! mountpoint -q /gcs/$bucket; then
  sudo mkdir -p /gcs/$bucket
  sudo chown "\$(id -u)" /gcs/$bucket
  gcsfuse --implicit-dirs --rename-dir-limit=200000 \\
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $bucket /gcs/$bucket
fi
cd ~/tlcm/source
echo "--- \$new" >> ~/tlcm/run.log
rm -f ~/tlcm/run.exit
# Beside main stands a shell that notes how it ended; it must outlive a polite signal to both.
setsid nohup bash -c 'trap : TERM; "\$@" >> ~/tlcm/run.log 2>&1; echo \$? > ~/tlcm/run.exit' \\
  keeper ~/tlcm/venv/bin/python -u -m tlcm_jax.main$main > /dev/null 2>&1 < /dev/null &
echo "\$new" > ~/tlcm/run.id
echo \$! > ~/tlcm/run.pid
tell started
SCRIPT
  )"
  $dry_run || say "started on $slice; read it with: $program logs --name $name" \
    "--zone $zone --project $project --follow"
}

logs() {
  local tail="tail -n $lines"
  if $follow; then tail+=' -F'; fi
  on_workers 'reading the log' "$worker" \
    "[ -e ~/tlcm/run.log ] || { echo 'no log yet: nothing was run here' >&2; exit $refused; }; $tail ~/tlcm/run.log"
}

status() {
  local answer state rest
  if $dry_run; then
    execute "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
  else
    answer=$(queue_state) || exit 1
    read -r state rest <<<"$answer" || true
    printf '%s: %s\n' "$slice" "${state:-does not exist} ${rest-}"
    [[ $state == ACTIVE ]] || return 0
  fi
  on_workers 'asking the workers' all "$(
    remote_functions
    cat <<'SCRIPT'
if [ "$pid" = none ]; then tell 'nothing was run'
elif alive; then tell "running $id"
else tell "ended $id; last line: $(tail -n 1 ~/tlcm/run.log)"; fi
SCRIPT
  )"
}

stop() {
  $dry_run || say "stopping the run on every worker of $slice"
  # A polite signal first, on which main writes a checkpoint; a process that sits in a
  # collective may need the other one.
  on_workers 'stopping' all "$(
    remote_functions
    cat <<'SCRIPT'
if ! alive; then tell 'nothing is running'; exit 0; fi
kill -TERM -- "-$pid"
for _ in $(seq 120); do alive || break; sleep 1; done
if alive; then kill -KILL -- "-$pid"; fi
tell stopped
SCRIPT
  )"
}

delete() {
  local answer typed=''
  $dry_run || say "this deletes the $slice: its queued resource, its virtual machines and" \
    "their disks, with any run on them. Files in Cloud Storage stay."
  if ! $dry_run && ! $yes; then
    [[ -t 0 ]] || die 'nobody to ask: add --yes to delete without asking'
    read -r -p "Type the slice's name to delete it: " typed
    [[ $typed == "$name" ]] || die "'$typed' is not '$name': nothing was deleted"
  fi
  if ! $dry_run; then
    answer=$(queue_state) || exit 1
    [[ -n $answer ]] || die "the $slice does not exist: check --name, --zone and --project"
  fi
  retry "deleting $name" "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
  $dry_run || say "deleted the $slice"
}

# What the workers are doing, a word each: fresh (not installed), idle, running, or how their run of
# this workdir ended, as ended:STATUS.
outcomes() {
  "${vm[@]}" ssh "$name" "${where[@]}" --worker=all --quiet --command="$(
    remote_functions
    cat <<SCRIPT
case "\$id" in *' $workdir '*) ;; *) id=none ;; esac
if [ ! -x ~/tlcm/venv/bin/python ]; then echo fresh
elif alive; then echo running
elif [ "\$id" = none ]; then echo idle
elif [ -e ~/tlcm/run.exit ]; then echo "ended:\$(cat ~/tlcm/run.exit)"
else echo ended:lost; fi
SCRIPT
  )"
}

# step COMMAND OPTIONS...: another command of this script on the same slice, in a shell of its own.
step() {
  local verb=$1
  shift
  bash "$root/launch/$program" "$verb" --name "$name" --zone "$zone" --project "$project" \
    --retries "$retries" --retry-delay "$retry_delay" "$@"
}

keep() {
  check --config "$config" '[^/].*\.py(:.*)?' configs/sdxl.py
  check --workdir "$workdir" 'gs://[a-z0-9][-_.a-z0-9]+/.+' gs://my-bucket/runs/sdxl
  local asked=(--accelerator "$accelerator" --wait "$wait_minutes" --poll "$poll")
  local started=(--config "$config" --workdir "$workdir")
  if [[ -n $version ]]; then asked+=(--version "$version"); fi
  if $spot; then asked+=(--spot); fi
  if ((${#main_args[@]} > 0)); then started+=(-- "${main_args[@]}"); fi
  if $dry_run; then
    step create --dry-run "${asked[@]}"
    step setup --dry-run
    step run --dry-run "${started[@]}"
    return
  fi
  local doing status failures=0 since=$SECONDS
  while true; do
    status=0
    step create "${asked[@]}" || status=$?
    ((status != 2)) || exit 2
    if ((status == 0)) && doing=$(outcomes); then
      doing=" $(printf '%s\n' "$doing" | sort -u | tr '\n' ' ')"
      case $doing in
        ' running ') ;;
        ' ended:0 ')
          say "finished: $workdir"
          if $delete_after; then step delete --yes; fi
          return 0
          ;;
        ' ended:0 running ') ;; # the others are about to end
        *)
          # Main ends with 75 when it was asked to stop. Whatever it was, the same command resumes
          # the run, on all workers together.
          if [[ $doing == *' ended:1 '* ]]; then fail 'the run ended with an error'; fi
          say "starting the run; the workers are:$doing"
          since=$SECONDS
          if ! begin "$doing" "${started[@]}"; then fail 'the run did not start'; fi
          ;;
      esac
    else
      fail 'the slice is not to be had'
    fi
    sleep "$watch"
  done
}

# begin DOING OPTIONS...: starts the run, after what the workers still need.
begin() {
  local doing=$1
  shift
  if [[ $doing == *' fresh '* ]]; then step setup || return 1; fi
  step stop && step run "$@"
}

# fail WHAT: waits after a failure, and ends the script after too many without half an hour's work
# between them.
fail() {
  if ((SECONDS - since > 1800)); then failures=0; fi
  failures=$((failures + 1))
  ((failures <= retries)) ||
    die "$1, $failures times: see above and the log; the same command goes on from there"
  say "$1: try $failures of $retries"
  sleep "$((retry_delay * failures))"
}

"$command"

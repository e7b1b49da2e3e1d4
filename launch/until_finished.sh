#!/usr/bin/env bash
# Starts tlcm_jax.main again until it has finished: for one machine with GPUs, spot ones too.
#
#   launch/until_finished.sh --config configs/sdxl.py --workdir runs/sdxl
#
# All arguments are main's. Started at boot (systemd, cron's @reboot) it goes on with the run after
# the machine was taken away. TLCM_PYTHON is the python to use. A run that ends with an error is not
# tried again at once more than TLCM_RETRIES times (3).
set -uo pipefail

failures=0
child=''
stop() {
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null; fi
  stopping=true
}
stopping=false
trap stop TERM INT
while true; do
  began=$SECONDS
  "${TLCM_PYTHON:-python}" -u -m tlcm_jax.main "$@" &
  child=$!
  status=0
  wait "$child" || status=$?
  if $stopping; then # the wait itself was interrupted: now for main
    wait "$child" || status=$?
    exit "$status"
  fi
  case $status in
    0 | 2) exit "$status" ;; # finished; or a mistake in the command line
    75) failures=0 ;;        # asked to stop, and saved
    *)
      if ((SECONDS - began > 1800)); then failures=0; fi
      failures=$((failures + 1))
      if ((failures > ${TLCM_RETRIES:-3})); then
        echo "until_finished.sh: ended with status $status, $failures times: see above" >&2
        exit "$status"
      fi
      sleep "$((failures * ${TLCM_DELAY:-15}))"
      ;;
  esac
  echo "until_finished.sh: main ended with status $status: starting it again" >&2
done

#!/usr/bin/env bash
# For tests of the job scripts alone, first on PATH as `nemo-tsdkd`: keeps the trainer's contract with them (last_step,
# FINISHED, stop on SIGUSR1 and SIGTERM), notes how it was called in RUN_DIR/calls, and misbehaves as STAND_IN says.
set -euo pipefail
# Before the note, upon which a test sends its signal.
if [[ ${STAND_IN:-} == hang ]]; then trap '' USR1 TERM; else trap 'stop=yes' USR1 TERM; fi
printf '%s image=%s name=%s mounts=%s\n' "$*" "${TEST_CONTAINER_IMAGE:-}" "${TEST_CONTAINER_NAME:-}" \
  "${TEST_CONTAINER_MOUNTS:-}" >>"$RUN_DIR/calls"
if [[ $1 == check && ${STAND_IN:-} == crash && ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then
  echo "nemo-tsdkd: error: student.path: no such folder" >&2 && exit 2 # the node's disk is not mounted
fi
[[ $1 == train ]] || exit 0
[[ ${STAND_IN:-} != crash ]] || { echo "RuntimeError: out of luck" >&2 && exit 3; }
step=$(cat "$RUN_DIR/last_step" 2>/dev/null || echo 0)
until [[ -n ${stop:-} && -n ${stepped:-} ]] || ((step == ${STAND_IN_STEPS:-5})); do # a step is done to its end
  sleep 0.2 || true # the signal comes to it, too
  step=$((step + 1)) stepped=yes
done
((SLURM_PROCID == 0)) || exit 0
echo "$step" >"$RUN_DIR/last_step"
[[ -n ${stop:-} ]] || touch "$RUN_DIR/FINISHED"

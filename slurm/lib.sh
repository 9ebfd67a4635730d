# shellcheck shell=bash
# Sourced by the job scripts: turns a job's environment into `nemo-tsdkd` steps on its nodes, and a stopped job into its
# next attempt. docs/cluster.md explains every variable. Runs outside the container, with Slurm's commands at hand.

TSDKD_HOME=${TSDKD_HOME:-$SLURM_SUBMIT_DIR} # the checkout
MODELS_DIR=${MODELS_DIR:-$TSDKD_HOME/models}
MAX_RESTARTS=${MAX_RESTARTS:-3}
SAVE_SECONDS=${SAVE_SECONDS:-240} # less than the 300 of --signal
export MODELS_DIR

# sbatch --export=NONE leaves a setting behind that would strip the environment from every srun too.
export SLURM_EXPORT_ENV=ALL
# Containers have no scontrol: the ranks read their nodes from here (nemo_tsdkd/distributed/launch.py).
TSDKD_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ' ')
export TSDKD_HOSTS
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer inherits it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun does: else each task starts a thread for every core
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # no two micro-batches are alike
export CUDA_DEVICE_MAX_CONNECTIONS=1         # Megatron overlaps tensor-parallel communication by launch order

say() { printf '%s slurm: %s\n' "$(date '+%F %T')" "$*"; }
usage_error() { # exit 2: the user's to mend, never requeued
  say "error: $*" >&2
  exit 2
}
require() { # require VARIABLE MEANING
  [[ -n ${!1:-} ]] || usage_error "$1 is not set: $2. See docs/cluster.md."
}

options_after_dashes() { # fills OPTIONS with what follows --
  [[ $# -eq 0 || $1 == -- ]] || usage_error "unexpected argument '$1': options and Hydra overrides go after --"
  OPTIONS=("${@:2}")
}

# A model by name lies in MODELS_DIR, where import.sh put it; anything that is a folder is taken as it is.
model_folder() { if [[ -d $1 ]]; then realpath "$1"; else printf '%s/%s' "$MODELS_DIR" "$1"; fi; }

# ---- containers -----------------------------------------------------------------------------------------------------

CONTAINER=()
[[ -n ${CONTAINER_IMAGE:-} ]] || command -v nemo-tsdkd >/dev/null ||
  usage_error "nemo-tsdkd is not on PATH: activate its environment before sbatch, or set CONTAINER_IMAGE"
use_container() { # use_container FOLDER...: run the steps in CONTAINER_IMAGE (pyxis), if set, with these folders mounted
  [[ -n ${CONTAINER_IMAGE:-} ]] || return 0
  local folder mounts=${CONTAINER_MOUNTS:-}
  for folder in "$TSDKD_HOME" "$MODELS_DIR" "$@"; do
    [[ ! -e $folder ]] || mounts+="${mounts:+,}$folder:$folder"
  done
  CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$TSDKD_HOME"
    --no-container-mount-home --container-writable) # caches go into the container's own home
  # Without a name each step of each attempt unpacks the image anew, and the GPUs wait.
  [[ -z ${CONTAINER_NAME:-} ]] || CONTAINER+=(--container-name="$CONTAINER_NAME")
}

# ---- steps ----------------------------------------------------------------------------------------------------------

# --signal=B:USR1@300 comes to this shell before the limit, and before a preemption where the cluster sends user signals;
# the trainer saves and stops on it, as it does on the SIGTERM of any other preemption.
ALARM="" SIGNALLED="" OVERDUE=""
trap 'SIGNALLED=yes; ask_to_stop' USR1
trap 'SIGNALLED=yes OVERDUE=yes' USR2
ask_to_stop() {
  say "signalled: the steps have $SAVE_SECONDS s to save and stop"
  # The steps, not this shell. Without its || a busy controller would end this shell: `set -e` counts inside a trap.
  scancel --signal=USR1 "$SLURM_JOB_ID" || scancel --signal=USR1 "$SLURM_JOB_ID" ||
    say "scancel cannot reach the steps: they stop at the next signal, or as overdue" >&2
  { sleep "$SAVE_SECONDS" && kill -USR2 $$; } &
  ALARM=$!
}

step() { # step NAME [SRUN_OPTION...] COMMAND...: on every task; one log for each rank
  local name=$1 pid status
  shift
  [[ -z $ALARM ]] || return 143 # signalled between two steps
  say "$name: logs in $LOGS/$name-*.log"
  # Without --cpu-bind=none each task may be tied to one core: no --cpus-per-task fits every cluster.
  srun --kill-on-bad-exit=1 --cpu-bind=none --output="$LOGS/$name-%4t.log" "${CONTAINER[@]}" "$@" &
  pid=$!
  while :; do # a trapped signal ends `wait` early
    SIGNALLED="" status=0
    wait "$pid" || status=$?
    [[ -n $SIGNALLED && -z $OVERDUE ]] || break
  done
  [[ -z $ALARM ]] || kill "$ALARM" 2>/dev/null || true
  if [[ -n $OVERDUE ]]; then
    say "$name: still running $SAVE_SECONDS s after the signal, as if it hung" >&2
    return 124
  fi
  ((status == 0)) || show_failure "$name" "$status"
  return "$status"
}

show_failure() { # show_failure NAME STATUS: the end of the first log that mentions an error
  local log
  log=$(grep -lE 'Error|error|FAILED' "$LOGS/$1"-*.log 2>/dev/null | head -n 1) || true
  say "$1: exit status $2; from ${log:-its logs}:" >&2
  [[ -z $log ]] || tail -n 20 "$log" >&2
}

# ---- configuration ---------------------------------------------------------------------------------------------------

# The public recipe's variables, by the configuration field each one sets.
declare -A FIELDS=(
  [RUN_DIR]=run_dir
  [MODEL_NAME]=student.path
  [TEACHER_NAME]=teacher.path
  [DATA]=data.path
  [BETA]=objective.beta
  [LAMBDA]=rollout.lmbda
  [THRESHOLD]=objective.threshold
  [INDIRECT_KD_ALPHA]=objective.indirect_kd_alpha
)

configure() { # configure [-- HYDRA_OVERRIDE...]: fills OVERRIDES, the user's own last; mounts what they name
  local variable value
  [[ -z ${MODEL_NAME:-} ]] || MODEL_NAME=$(model_folder "$MODEL_NAME")
  [[ -z ${TEACHER_NAME:-} ]] || TEACHER_NAME=$(model_folder "$TEACHER_NAME")
  OVERRIDES=("parallel.num_nodes=$SLURM_JOB_NUM_NODES" "parallel.gpus_per_node=$SLURM_NTASKS_PER_NODE")
  for variable in "${!FIELDS[@]}"; do
    value=${!variable:-}
    [[ -z $value ]] || OVERRIDES+=("${FIELDS[$variable]}='${value//\'/\\\'}'") # quoted as Hydra reads it
  done
  options_after_dashes "$@"
  OVERRIDES+=("${OPTIONS[@]}")
  # A container's own cache would go with it, and every attempt would tokenize anew.
  export HF_DATASETS_CACHE=${HF_DATASETS_CACHE:-$RUN_DIR/cache}
  use_container "$RUN_DIR" "$HF_DATASETS_CACHE" "${DATA:-}" "${MODEL_NAME:-}" "${TEACHER_NAME:-}"
}

# ---- one-step jobs --------------------------------------------------------------------------------------------------

run_once() { # run_once NAME COMMAND...: a job of a single step, without restarts
  LOGS=$TSDKD_HOME/slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
  mkdir -p "$LOGS"
  step "$@"
  say "$1: done"
}

# ---- training --------------------------------------------------------------------------------------------------------

train() { # train CONFIG [-- HYDRA_OVERRIDE...]
  local config=$1 arguments status=0
  shift
  require RUN_DIR "the folder of this run, on a disk that all nodes share"
  RUN_DIR=$(realpath -m "$RUN_DIR")
  LOGS=$RUN_DIR/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$LOGS"
  if [[ -e $RUN_DIR/FINISHED ]]; then
    say "$RUN_DIR/FINISHED exists: nothing to do"
    exit 0
  fi
  configure "$@"
  arguments=(--config-name "$config" "${OVERRIDES[@]}")

  # One task first: wrong arguments are reported in seconds and never requeued.
  START_STEP=$(last_step)
  { step check --nodes=1 --ntasks=1 nemo-tsdkd check "${arguments[@]}" &&
    step preflight nemo-tsdkd preflight ${ALLOW_CPU:+--allow-cpu} "${arguments[@]}" &&
    step train nemo-tsdkd train "${arguments[@]}"; } || status=$?
  # Bad arguments are not requeued. What an earlier attempt was started with has been good: then a disk may be missing.
  ((status != 2 || ${SLURM_RESTART_COUNT:-0} > 0)) || exit 2
  end_attempt "$status"
}

last_step() { cat "$RUN_DIR/last_step" 2>/dev/null || echo 0; }
job_state() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o ' JobState=[A-Z_]*' | cut -d= -f2; }

end_attempt() { # end_attempt STATUS: finished, or the next attempt, or the end of a crash loop
  local status=$1 step job stalled
  if [[ -e $RUN_DIR/FINISHED ]]; then
    say "finished: $RUN_DIR"
    exit 0
  fi
  if [[ $(job_state) == CANCELLED ]]; then
    say "cancelled at step $(last_step): not requeued"
    exit 1
  fi
  step=$(last_step)
  stalled=0
  if ((step <= START_STEP)); then
    [[ ! -e $RUN_DIR/stalled ]] || read -r job stalled <"$RUN_DIR/stalled"
    [[ ${job:-} == "$SLURM_JOB_ID" ]] || stalled=0 # of an earlier job
    stalled=$((stalled + 1))
  fi
  echo "$SLURM_JOB_ID $stalled" >"$RUN_DIR/stalled"
  if ((stalled > MAX_RESTARTS)); then
    say "crash loop: $stalled attempts in a row stopped at step $step (MAX_RESTARTS=$MAX_RESTARTS); logs: $RUN_DIR/logs" >&2
    exit 1
  fi
  say "stopped at step $step with status $status: requeued"
  scontrol requeue "$SLURM_JOB_ID" || {
    say "this cluster refuses scontrol requeue: submit again, or a chain with --dependency=singleton" >&2
    exit 1
  }
  exit 0
}

#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=slurm/logs/%x-%j.out
# The student of a run (its newest complete checkpoint, or CHECKPOINT) as a Hugging Face model, or FORMAT=nemo:
#   RUN_DIR=/shared/run OUTPUT=/shared/student sbatch slurm/export.sh
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
CHECKPOINT=${CHECKPOINT:-${RUN_DIR:-}}
require CHECKPOINT "a run folder (RUN_DIR) or one of its checkpoints"
require OUTPUT "the folder to create"
mkdir -p "$(dirname "$OUTPUT")"
use_container "$CHECKPOINT" "$(dirname "$OUTPUT")"
run_once export nemo-tsdkd export --checkpoint "$CHECKPOINT" --to "${FORMAT:-hf}" --output "$OUTPUT"

#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
# Scores of an exported student; TASKS is a group of conf/evaluate (default: paper) or task names joined by commas:
#   MODEL=/shared/student OUTPUT=/shared/scores.json sbatch slurm/evaluate.sh [-- EVALUATE_OPTION...]
# Scores are written after each task. Submitted again, it continues where it stopped.
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
require MODEL "a Hugging Face folder, such as export.sh writes"
require OUTPUT "the JSON file to write"
options_after_dashes "$@"
mkdir -p "$(dirname "$OUTPUT")"
use_container "$MODEL" "$(dirname "$OUTPUT")" "${HF_HOME:-}" "${NLTK_DATA:-}"
run_once evaluate nemo-tsdkd evaluate --model "$MODEL" --tasks "${TASKS:-paper}" --output "$OUTPUT" "${OPTIONS[@]}"

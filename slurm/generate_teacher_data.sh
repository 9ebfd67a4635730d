#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-generate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
# Responses of the teacher to the prompts in DATA, for off-policy training (LAMBDA=0 DATA=OUTPUT):
#   DATA=/shared/prompts.jsonl OUTPUT=/shared/a/responses sbatch slurm/generate_teacher_data.sh [-- HYDRA_OVERRIDE...]
# CONFIG_NAME names the pair. Submitted again, it continues where it stopped.
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
require OUTPUT "the folder for the teacher's responses"
RUN_DIR=$(dirname "$OUTPUT")
mkdir -p "$(dirname "$OUTPUT")"
configure "$@"
run_once generate nemo-tsdkd generate --config-name "${CONFIG_NAME:-tsdkd_14b_to_1.5b}" --model teacher \
  --output "$OUTPUT" "${OVERRIDES[@]}"

#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-qwen3-235b-a22b-to-8b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
# Qwen3-235B-A22B -> Qwen3-8B. From the checkout:
#   RUN_DIR=/shared/run DATA=/shared/prompts.jsonl sbatch slurm/tsdkd_qwen3_235b_a22b_to_8b.sh [-- HYDRA_OVERRIDE...]
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
train tsdkd_qwen3_235b_a22b_to_8b "$@"

#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-qwen3-30b-a3b-to-4b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
# Qwen3-30B-A3B -> Qwen3-4B. From the checkout:
#   RUN_DIR=/shared/run DATA=/shared/prompts.jsonl sbatch slurm/tsdkd_qwen3_30b_a3b_to_4b.sh [-- HYDRA_OVERRIDE...]
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
train tsdkd_qwen3_30b_a3b_to_4b "$@"

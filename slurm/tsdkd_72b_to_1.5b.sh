#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-72b-to-1.5b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
# Qwen2.5-72B-Instruct -> Qwen2.5-1.5B-Instruct. From the checkout:
#   RUN_DIR=/shared/run DATA=/shared/prompts.jsonl sbatch slurm/tsdkd_72b_to_1.5b.sh [-- HYDRA_OVERRIDE...]
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
train "tsdkd_72b_to_1.5b${LAYOUT:+_$LAYOUT}" "$@"

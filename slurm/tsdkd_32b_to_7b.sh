#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-32b-to-7b
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
# Qwen2.5-32B-Instruct -> Qwen2.5-7B-Instruct. From the checkout:
#   RUN_DIR=/shared/run DATA=/shared/prompts.jsonl sbatch slurm/tsdkd_32b_to_7b.sh [-- HYDRA_OVERRIDE...]
# LAYOUT=long takes the second layout, for responses of up to 32k tokens (docs/cluster.md).
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
train "tsdkd_32b_to_7b${LAYOUT:+_$LAYOUT}" "$@"

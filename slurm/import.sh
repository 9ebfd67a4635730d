#!/usr/bin/env bash
#SBATCH --job-name=tsdkd-import
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=slurm/logs/%x-%j.out
# A Hugging Face model to the NeMo checkpoint that training jobs find by its name; once for each model:
#   MODEL_NAME=Qwen/Qwen2.5-14B-Instruct sbatch slurm/import.sh
# reads MODELS_DIR/hf/MODEL_NAME (or SOURCE) and writes MODELS_DIR/MODEL_NAME. Each task holds a share of the model in host
# memory; for a large one give more: sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/import.sh
set -euo pipefail
# shellcheck source=slurm/lib.sh
source "${TSDKD_HOME:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"
require MODEL_NAME "the model's name, such as Qwen/Qwen2.5-14B-Instruct"
SOURCE=${SOURCE:-$MODELS_DIR/hf/$MODEL_NAME}
mkdir -p "$MODELS_DIR" # only folders that exist are mounted
use_container "$SOURCE"
run_once import nemo-tsdkd import --source "$SOURCE" --output "$MODELS_DIR/$MODEL_NAME"

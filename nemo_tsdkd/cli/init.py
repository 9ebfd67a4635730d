"""`nemo-tsdkd init DIR`: a commented configuration and a job script for two models and a cluster, to change by hand."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import write_atomically
from nemo_tsdkd.config.validation import UserError

NAME = "distil"  # of both files
_CONFIG = """\
# Written by `nemo-tsdkd init`, to be changed by hand. nemo_tsdkd/config/schema.py and train_config.py have every field
# and its default. After a change, on a machine without a GPU:
#   nemo-tsdkd check --config-name distil --config-dir {folder}
defaults:
  - train # conf/train.yaml: the paper's objective, bf16
  - _self_
run_dir: {run_dir} # on a disk that all nodes share
max_steps: 1000
global_batch_size: {global_batch_size} # sequences of a step, over all GPUs
micro_batch_size: 1 # sequences of one forward and backward pass on a GPU
progress_bar: false
student: # a Hugging Face folder with safetensors, or what `nemo-tsdkd import` made of it
  path: {student}
teacher:
  path: {teacher}
  parallel: # its layout on the same GPUs
    tensor_model_parallel_size: {teacher_tp}
    sequence_parallel: {teacher_sp}
data: # .jsonl or .parquet with a column `prompt`: text, or a list of chat messages
  path: {data}
  seq_length: {seq_length} # prompt and response; longer prompts are dropped and counted
rollout:
  lmbda: 1.0 # share of batches that the student writes; the others take the data's column `response`
  max_new_tokens: {max_new_tokens}
parallel: # the student's layout; data parallelism takes the GPUs that TP leaves
  tensor_model_parallel_size: {student_tp}
  sequence_parallel: {student_sp}
  num_nodes: {nodes}
  gpus_per_node: {gpus_per_node}
optim:
  lr: 1.0e-5
  warmup_steps: 20
checkpoint:
  every_n_steps: 50
# validation: # the student's answers to held-out prompts, judged in the loop
#   path: held_out.jsonl
#   answer_column: answer
#   verifier: math
"""
_SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name=tsdkd
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus_per_node}
#SBATCH --gpus-per-node={gpus_per_node}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={time}
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="{folder}/%x-%j.out"
{cluster}# Written by `nemo-tsdkd init`: sbatch {script} [-- HYDRA_OVERRIDE...]
set -euo pipefail
export TSDKD_HOME=${{TSDKD_HOME:-{checkout}}} RUN_DIR=${{RUN_DIR:-{run_dir}}}
# shellcheck source=/dev/null
source "$TSDKD_HOME/slurm/lib.sh"
options_after_dashes "$@"
train distil -- --config-dir {quoted_folder} "${{OPTIONS[@]}}"
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write DIR/distil.yaml and DIR/distil.sh for two models and a cluster, then check the configuration. What is not
    given is asked for on a terminal."""
    parser = argparse.ArgumentParser(prog="nemo-tsdkd init", description=main.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to, on a disk that all nodes share")
    parser.add_argument("--student", help="Hugging Face or NeMo folder")
    parser.add_argument("--teacher", help="Hugging Face or NeMo folder")
    parser.add_argument("--data", help="prompts: .jsonl, .parquet, a folder of them, or a data set of the hub")
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: DIR/run)")
    for flag, default, meaning in (
        ("--nodes", 1, "nodes of a job"),
        ("--gpus-per-node", 8, "GPUs of a node"),
        ("--student-tp", 1, "GPUs that share the student's layers"),
        ("--teacher-tp", 1, "GPUs that share the teacher's layers"),
        ("--global-batch-size", 64, "sequences of a step"),
        ("--seq-length", 4096, "tokens of prompt and response"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--time", default="24:00:00", help="a job's time limit, as Slurm writes it (default: 24:00:00)")
    parser.add_argument("--partition", help="Slurm's")
    parser.add_argument("--account", help="Slurm's")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[2], help="the one with slurm/lib.sh")
    args = parser.parse_args(argv)
    config, script = write(args)
    print(f"wrote {config} and {script}", file=sys.stderr)

    from nemo_tsdkd.cli.main import check_main

    try:
        check_main(["--config-name", NAME, "--config-dir", str(args.folder)])
    except UserError as error:
        raise UserError(
            f"{error} Change {config}, then: nemo-tsdkd check --config-name {NAME} "
            f"--config-dir {shlex.quote(str(args.folder))}"
        ) from error
    print(f"next: sbatch {shlex.quote(str(script))}", file=sys.stderr)


def write(args: argparse.Namespace) -> tuple[Path, Path]:
    """Write both files for the command's arguments; return their paths.

    Raises:
        UserError: a file is there already, an argument is missing and nobody can be asked, or one that Slurm or this
            checkout does not take.
    """
    folder = args.folder.resolve()
    config, script = folder / f"{NAME}.yaml", folder / f"{NAME}.sh"
    _check(args, config, script)
    run_dir = (args.run_dir or folder / "run").resolve()
    inputs = {name: _given(args, name) for name in ("student", "teacher", "data")}
    paths = {name: str(Path(value).resolve()) if Path(value).exists() else value for name, value in inputs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    written = _CONFIG.format_map(
        vars(args)
        | {name: json.dumps(value) for name, value in (paths | {"run_dir": str(run_dir)}).items()}
        | {"folder": shlex.quote(str(folder)), "max_new_tokens": args.seq_length * 3 // 4}
        | {f"{model}_sp": str(vars(args)[f"{model}_tp"] > 1).lower() for model in ("student", "teacher")}
    )
    cluster = (f"#SBATCH --{name}={vars(args)[name]}\n" for name in ("partition", "account") if vars(args)[name])
    job = _SCRIPT.format_map(
        vars(args)
        | {"folder": folder, "cluster": "".join(cluster), "script": shlex.quote(str(script))}
        | {"quoted_folder": shlex.quote(str(folder)), "run_dir": shlex.quote(str(run_dir))}
        | {"checkout": shlex.quote(str(args.checkout.resolve()))}
    )
    write_atomically(config, written.encode())
    write_atomically(script, job.encode())
    return config, script


def _check(args: argparse.Namespace, config: Path, script: Path) -> None:
    for path in (config, script):
        if path.exists():
            raise UserError(f"DIR = {args.folder}: {path.name} is there already. Remove it or choose another folder.")
    if not (args.checkout / "slurm" / "lib.sh").is_file():
        raise UserError(f"--checkout = {args.checkout}: has no slurm/lib.sh. Give the folder of a checkout.")
    for name in ("partition", "account", "time"):
        value = vars(args)[name]
        if value is not None and not re.fullmatch(r"[\w.:,+-]+", value, re.ASCII):
            raise UserError(f"--{name} = {value!r}: must be letters, digits and . : , + - only. Give it as Slurm does.")
    for name, value in (("DIR", config.parent), ("--run-dir", args.run_dir)):
        if re.search(r'[\n"\\%$]', str(value)):  # Slurm reads the script's header, OmegaConf the configuration
            raise UserError(f'{name} = {value}: must not hold a line break, ", \\, % or $. Choose another folder.')


def _given(args: argparse.Namespace, name: str) -> str:
    value = getattr(args, name)
    if not value and sys.stdin.isatty():
        value = input(f"{name}: ").strip()
    if not value:
        raise UserError(f"--{name} is missing. Give it, or call init on a terminal.")
    if "${" in value:
        raise UserError(
            f"--{name} = {value}: holds ${{, which a configuration reads as a reference. Rename the folder."
        )
    return value

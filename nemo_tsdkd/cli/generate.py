"""`nemo-tsdkd generate`: responses of the teacher or the student, written to files that `nemo-tsdkd train` reads.

Teacher-written data for `rollout.lmbda: 0.0` and sequence-level distillation, or rollouts made apart from training.
An interrupted run continues with the missing shards and writes the same responses as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import require_creatable
from nemo_tsdkd.checks.setup import check_setup
from nemo_tsdkd.checks.start import check_weights
from nemo_tsdkd.config.compose import add_config_arguments, config_from
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.response_shards import FORMATS, Shards
from nemo_tsdkd.distributed import launch
from nemo_tsdkd.distributed.output import redirect_library_output


def main(argv: Sequence[str] | None = None) -> None:
    """`nemo-tsdkd generate --config-name NAME --model student|teacher --output DIR [key=value ...]`.

    The configuration is that of a training run, valid as a whole; `data`, `rollout`, `parallel`, `seed` and the
    generating model's section decide the responses.
    """
    place = launch.environment()
    parser = argparse.ArgumentParser(prog="nemo-tsdkd generate", description=main.__doc__)
    add_config_arguments(parser)
    parser.add_argument("--model", choices=("student", "teacher"), required=True, help="which model generates")
    parser.add_argument("--output", type=Path, required=True, help="folder of shards; an unfinished one is continued")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    parser.add_argument("--shard-size", type=int, help="prompts in one file; default: up to 1024, work for every copy")
    args = parser.parse_intermixed_args(argv)
    if args.shard_size is not None and args.shard_size < 1:
        raise UserError(f"--shard-size = {args.shard_size}: must be at least 1. Give a positive number.")
    config = config_from(args)
    shapes = check_setup(config, batch=False)
    if args.model in shapes and shapes[args.model].experts:
        raise UserError(
            f"{args.model}.path = {getattr(config, args.model).path!r}: a mixture of experts, but `generate` decodes "
            "dense models only. Let an inference engine write the responses; train on its file, rollout.lmbda = 0."
        )
    parallel = config.layout_of(args.model)
    block = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if place.world_size % block:
        raise UserError(
            f"{place.world_size} ranks were started: must be a multiple of TP x PP = {block}. Start as many copies of "
            "the model as you like, with srun or `torchrun --nproc-per-node N -m nemo_tsdkd generate`."
        )
    require_creatable("--output", args.output)
    check_weights(Path(getattr(config, args.model).path))
    # The scripts of slurm/ give every rank its own log files; elsewhere the ranks of a node share one.
    log = args.output.with_name(f"{args.output.name}.log")
    with nullcontext() if "SLURM_JOB_ID" in os.environ else redirect_library_output(log):
        from nemo_tsdkd.megatron.rollout.responses import write_responses

        write_responses(config, args.model, Shards(args.output, args.format, args.shard_size or 0))

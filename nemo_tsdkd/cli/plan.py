"""`nemo-tsdkd plan`: dry-run a job on this machine's CPUs before it waits in a queue."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from nemo_tsdkd.checkpoints.atomic import require_creatable
from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checks.setup import check_fields, check_layouts
from nemo_tsdkd.config.compose import add_config_arguments, config_from
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.distributed.progress import ProgressDisplay
from nemo_tsdkd.plan.hardware import Hardware
from nemo_tsdkd.plan.output import candidate_json, draw_memory, print_plan, print_sweep
from nemo_tsdkd.plan.plan import Plan, plan_job
from nemo_tsdkd.plan.request import ACTS
from nemo_tsdkd.plan.roles import Role, of_ranks, roles
from nemo_tsdkd.plan.sweep import sweep


def main(argv: Sequence[str] | None = None) -> None:
    """Run two steps of each of a job's roles on fake tensors among fake ranks, with the code that trains: memory by
    stage and act, collectives, FLOPs, and an estimate of the time. Of the models it needs their config.json only."""
    parser = argparse.ArgumentParser(prog="nemo-tsdkd plan", description=main.__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--world", type=int, metavar="N", help="GPUs of the job, instead of parallel.num_nodes x gpus_per_node"
    )
    parser.add_argument(
        "--rank", type=int, action="append", help="plan this rank instead of one of each role; repeatable"
    )
    parser.add_argument("--opener-share", type=float, help="share of response tokens in the opener; default: threshold")
    parser.add_argument("--hardware", type=Path, help="speeds to assume; default: conf/hardware/h100.yaml")
    parser.add_argument("--sweep", action="store_true", help="list the layouts of the job's GPUs; dry-run the best")
    parser.add_argument("--best", type=int, default=3, help="of a sweep, how many layouts to dry-run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the memory")
    args = parser.parse_intermixed_args(argv)
    config = config_from(args)
    if args.world is not None:
        _set_world(config, args.world)
    shapes = check_plan(config)
    hardware = Hardware.read(*filter(None, [args.hardware]))
    share = config.objective.threshold if args.opener_share is None else args.opener_share
    if not 0 < share <= 1:
        raise UserError(f"--opener-share = {share}: must lie in (0, 1]. Give 1 for the most memory.")
    for option in ("json", "picture"):
        if getattr(args, option):
            require_creatable(f"--{option}", getattr(args, option))
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width
    if args.sweep:
        found = sweep(
            config, shapes, hardware, lambda layout: _planned(layout, shapes, hardware, share, roles(layout)), args.best
        )
        print_sweep(found, console)
        written: Any = [candidate_json(candidate) for candidate in found]
    else:
        plan = _planned(config, shapes, hardware, share, _roles(config, args.rank))
        print_plan(plan, console)
        written = plan.as_json()
        if args.picture:
            draw_memory(plan, args.picture)
    if args.json:
        args.json.write_text(json.dumps(written, indent=1) + "\n")


def _planned(
    config: TrainConfig, shapes: Mapping[str, ModelShape], hardware: Hardware, share: float, which: Sequence[Role]
) -> Plan:
    with ProgressDisplay("act", ACTS * len(which)) as display:
        said = f"{len(which)} ranks of {config.parallel.world_size}"
        show = partial(display.show, said=said)
        return plan_job(config, shapes, hardware, opener_share=share, show=show, which=which)


def check_plan(config: TrainConfig) -> dict[str, ModelShape]:
    """Both models' shapes. Raises UserError where the configuration is not valid or a model does not fit its layout."""
    check_fields(config)
    shapes = {which: ModelShape.of_folder(getattr(config, which).path) for which in ("student", "teacher")}
    check_layouts(config, shapes)
    return shapes


def _set_world(config: TrainConfig, world: int) -> None:
    per_node = config.parallel.gpus_per_node
    if world < 1 or world % per_node:
        raise UserError(f"--world = {world}: must be a multiple of parallel.gpus_per_node = {per_node}. Change one.")
    config.parallel.num_nodes = world // per_node


def _roles(config: TrainConfig, ranks: list[int] | None) -> list[Role]:
    if ranks is None:
        return roles(config)
    if bad := [rank for rank in ranks if not 0 <= rank < config.parallel.world_size]:
        raise UserError(f"--rank = {bad[0]}: must lie in [0, {config.parallel.world_size}). Give a rank of the job.")
    return of_ranks(config, ranks)

"""The `nemo-tsdkd` command. Each sub-command imports what it needs, so that help and errors come at once."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

from nemo_tsdkd.config.schema import ParallelConfig
from nemo_tsdkd.config.validation import HostError, UserError, is_of_the_host
from nemo_tsdkd.distributed import launch, output
from nemo_tsdkd.distributed.signals import end_with_torchrun, exit_on_stop_signals


def train_main(argv: Sequence[str]) -> None:
    place = launch.environment()
    command = launch.command_line(["train", *argv])
    exit_on_stop_signals(command, prints=place.rank == 0)
    end_with_torchrun()
    from nemo_tsdkd.checks.setup import check_ranks, check_setup
    from nemo_tsdkd.checks.start import check_start
    from nemo_tsdkd.config.compose import add_config_arguments, config_from
    from nemo_tsdkd.distributed.output import redirect_library_output

    parser = argparse.ArgumentParser(prog="nemo-tsdkd train")
    add_config_arguments(parser)
    config = config_from(parser.parse_intermixed_args(argv))
    shapes = check_setup(config)
    check_ranks(config, place.world_size)
    check_start(config, shapes)
    # The scripts of slurm/ give every rank its own log files.
    log = Path(config.run_dir, "logs", f"rank_{place.rank}.log")
    with nullcontext() if "SLURM_JOB_ID" in os.environ else redirect_library_output(log):
        from nemo_tsdkd.megatron.train import train

        stopped = train(config)
    if stopped is None:
        if place.rank == 0:
            from nemo_tsdkd.reporting.last_words import last_words

            print(*last_words(Path(config.run_dir)), sep="\n", flush=True)
        return
    if place.rank == 0:
        name = signal.Signals(stopped.signum).name
        line = f"{name}: stopped after step {stopped.step}, saved in {stopped.checkpoint}. Go on with: {command}"
        print(f"nemo-tsdkd: {line}", file=sys.stderr, flush=True)
    if stopped.exit_status:
        sys.exit(stopped.exit_status)


def check_main(argv: Sequence[str]) -> None:
    from omegaconf import OmegaConf

    from nemo_tsdkd.checks.memory import GIB, per_gpu, teacher_per_gpu
    from nemo_tsdkd.checks.setup import check_setup
    from nemo_tsdkd.checks.start import check_start
    from nemo_tsdkd.config.compose import add_config_arguments, config_from

    parser = argparse.ArgumentParser(prog="nemo-tsdkd check")
    add_config_arguments(parser)
    parser.add_argument("--deep", action="store_true", help="read the models' weights and compare their digests")
    args = parser.parse_intermixed_args(argv)
    config = config_from(args)
    shapes = check_setup(config)
    not_checked = check_start(config, shapes, args.deep)
    print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
    print(f"# valid for {config.parallel.world_size} ranks: {_layout(config.parallel, config.student_world_size)}")
    if not config.one_layout:
        ranks = config.teacher_world_size
        print(f"# the teacher on {ranks} of them: {_layout(config.teacher_parallel, ranks)}")
    if (experts := config.teacher.parallel.expert_model_parallel_size) > 1:
        print(f"# each expert of the teacher's on one of {experts} ranks")
    for what in not_checked:
        print(f"# not checked: {what}")
    if len(shapes) == 2:
        print(f"# the fullest GPU needs about {per_gpu(config, **shapes).peak / GIB:.1f} GiB")
        if config.teacher.nodes:
            print(f"# a GPU of the teacher's nodes needs about {teacher_per_gpu(config, **shapes) / GIB:.1f} GiB")


def _layout(parallel: ParallelConfig, ranks: int) -> str:
    return (
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"x CP {parallel.context_parallel_size} x DP {ranks // parallel.model_parallel_size}"
    )


def _later(module: str, function: str) -> Callable[[Sequence[str]], None]:
    """`nemo_tsdkd.module.function`, imported when it is called."""
    return lambda argv: getattr(import_module(f"nemo_tsdkd.{module}"), function)(argv)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "init": (_later("cli.init", "main"), "write a configuration and a job script to begin with"),
    "train": (train_main, "distil the teacher into the student"),
    "check": (check_main, "print the resolved configuration and say whether it can run; needs no GPU"),
    "plan": (
        _later("cli.plan", "main"),
        "dry-run a job on this CPU: memory, collectives and time of each kind of rank",
    ),
    "import": (_later("cli.convert", "import_main"), "Hugging Face checkpoint -> NeMo checkpoint"),
    "export": (_later("cli.convert", "export_main"), "training checkpoint -> NeMo or Hugging Face checkpoint"),
    "generate": (_later("cli.generate", "main"), "write responses of the student or the teacher to a folder"),
    "evaluate": (_later("cli.evaluate", "main"), "score an exported student on benchmarks"),
    "report": (_later("cli.report", "main"), "draw the curves and samples of runs into one HTML file"),
    "preflight": (
        _later("checks.preflight", "main"),
        "check nodes, network, files and configuration before a long job",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one sub-command. Bad input ends with one line on stderr and exit status 2, what the machine refuses (a full
    disk, a lost mount, a port in use) with one line and status 1; a defect shows its traceback on every rank."""
    parser = argparse.ArgumentParser(
        prog="nemo-tsdkd",
        description="Token-selective dual knowledge distillation on NeMo and Megatron.",
        epilog="\n".join(f"  {name:10} {purpose}" for name, (_, purpose) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.add_argument(
        "--verbose", action="store_true", help="show what libraries print, which else goes to log files"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below; each has its --help")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    args = parser.parse_args(argv)
    if args.verbose or "--verbose" in args.arguments:  # behind the command too
        args.arguments = [argument for argument in args.arguments if argument != "--verbose"]
        output.leave_library_output()
    # One rank of each node prints: a bad configuration is the same on all, but a file may be missing on one node only.
    prints = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    if not (prints and sys.stderr.isatty()):
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # not one bar a rank, nor one in a log file
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated")  # torch's import, not the user's
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("nemo_tsdkd").setLevel(logging.INFO if prints else logging.WARNING)
    try:
        COMMANDS[args.command][0](args.arguments)
    except (UserError, HostError, OSError) as e:
        if args.traceback or not (isinstance(e, UserError | HostError) or is_of_the_host(e)):
            raise
        if prints:
            said = [str(e), *getattr(e, "__notes__", [])]
            print(f"nemo-tsdkd: error: {' '.join(' '.join(said).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)


def run() -> None:
    """The command as a process of its own: `main`, and out as soon as the work is done."""
    status: object = 0
    try:
        main()
    except SystemExit as error:
        status = error.code
    # Python would first take apart, object by object, what NeMo's imports built: 4 s in every rank, in which a
    # preempted job must leave its nodes, and in which a library's destructor may still crash or hang.
    atexit._run_exitfuncs()  # logging and multiprocessing put their things in order here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)

"""`make demo`: Hugging Face checkpoints in, TSD-KD on four processes at TP 2 x PP 2, Hugging Face checkpoint out.

Each step of the main job is the command that a user would type, in a process of its own. The two Hugging Face
models are trained once and kept; the distillation starts afresh each time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_tsdkd.checkpoints.atomic import write_json
from nemo_tsdkd.checkpoints.start_over import METRICS
from nemo_tsdkd.config.compose import compose_config
from nemo_tsdkd.demo.pretrain import pretrained
from nemo_tsdkd.demo.score import accuracy
from nemo_tsdkd.demo.tasks import (
    DISTIL_SEED,
    HELD_OUT,
    TASK,
    Problem,
    held_out_problems,
    training_problems,
    written_steps,
)
from nemo_tsdkd.reporting.accuracy import ACCURACY
from nemo_tsdkd.reporting.rows import read_metrics
from nemo_tsdkd.reporting.run_files import SUMMARY

PROMPTS = 5_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo and write `demo/summary.json` under `--runs`; what stood in `demo/` is replaced."""
    parser = argparse.ArgumentParser(prog="python -m nemo_tsdkd.demo.run", description=main.__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the demo's results and its cache")
    parser.add_argument("--problems", type=int, default=HELD_OUT, help="held-out problems to score on")
    parser.add_argument("--verbose", action="store_true", help="show what libraries print and warn of")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of conf/demo.yaml, such as max_steps=20")
    args = parser.parse_args(argv)
    folder = args.runs / "demo"
    seconds: dict[str, float] = {}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    with _phase("pretraining", seconds):
        models = pretrained(args.runs / "demo-cache")
    problems = held_out_problems(args.problems)
    paths = {
        "run_dir": folder / "train",
        "student.path": models["student"],
        "teacher.path": models["teacher"],
        "data.path": write_prompts(folder / "prompts.jsonl", PROMPTS),
        "validation.path": write_held_out(folder / "held_out.jsonl", problems),
    }
    given = ["checkpoint.keep_best=true", *args.overrides]
    command = ["-m", "nemo_tsdkd", *(["--verbose"] if args.verbose else [])]
    overrides = [*(f"{key}={path}" for key, path in paths.items()), *given]
    config = compose_config("demo", overrides)
    with _phase("distillation", seconds):
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.parallel.world_size)]
        _python(*ranks, *command, "train", "--config-name", "demo", *overrides, verbose=args.verbose)
    models["distilled"] = folder / "student-hf"
    with _phase("export", seconds):
        paths_of_export = ["--checkpoint", str(folder / "train"), "--to", "hf", "--output", str(models["distilled"])]
        _python(*command, "export", *paths_of_export, verbose=args.verbose)
    with _phase("scoring", seconds):
        scores = {name: accuracy(path, problems) for name, path in models.items()}

    rows = read_metrics(folder / "train" / METRICS)
    summary = {
        "student_before": scores["student"],
        "teacher": scores["teacher"],
        "student_after": scores["distilled"],
        "problems": len(problems),
        "in_the_loop": {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row},
        "steps": json.loads((folder / "train" / SUMMARY).read_text())["steps"],
        "export": str(models["distilled"]),
        "seconds": seconds,
    }
    write_json(folder / "summary.json", summary)
    _show(summary)


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"demo: {name} ...", flush=True)
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 1)
    print(f"demo: {name} took {seconds[name]:.0f} s", flush=True)


def write_prompts(path: Path, count: int) -> Path:
    """`count` rows of the distillation's data. Responses serve off-policy steps, where rollout.lmbda is below 1."""
    with path.open("w", encoding="utf-8") as file:
        for problem in training_problems(count, DISTIL_SEED):
            file.write(json.dumps({"prompt": problem["question"], "response": written_steps(problem)}) + "\n")
    return path


def write_held_out(path: Path, problems: Sequence[Problem]) -> Path:
    """The held-out problems for validation, each with reasoning-gym's whole entry."""
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps({"prompt": problem["question"], "entry": problem}) + "\n")
    return path


def _python(*arguments: str, verbose: bool) -> None:
    # One thread a process: four ranks share a laptop's cores, and idle OpenMP threads would spin on them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not verbose:  # the warnings are NeMo's and Megatron's, four times over, on what only a GPU has
        environment["PYTHONWARNINGS"] = "ignore"
    subprocess.run([sys.executable, *arguments], env=environment, check=True)


def _show(summary: dict) -> None:
    table = Table("model")
    table.add_column("accuracy", justify="right")
    for name in ("student_before", "teacher", "student_after"):
        table.add_row(name.replace("_", " "), f"{summary[name]:.1%}")
    print(f"TSD-KD on {TASK}: {summary['steps']} steps, accuracy on {summary['problems']} held-out problems")
    Console().print(table)
    curve = ", ".join(f"{accuracy:.1%} after step {step}" for step, accuracy in summary["in_the_loop"].items())
    print(f"in the loop: {curve}")
    print(f"{sum(summary['seconds'].values()):.0f} s in all. Exported checkpoint: {summary['export']}")


if __name__ == "__main__":
    main()

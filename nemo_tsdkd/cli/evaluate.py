"""`nemo-tsdkd evaluate`: an exported Hugging Face folder on benchmarks of lm-evaluation-harness.

Scores are written after each task; the same command continues with the missing ones. What the harness prints goes into
OUTPUT.log, which stays where the work fails.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_tsdkd.checkpoints.atomic import read_json, write_json
from nemo_tsdkd.checkpoints.foreign import require_safe
from nemo_tsdkd.checkpoints.model_folder import content_key, require_importable
from nemo_tsdkd.checkpoints.transformers5 import transformers4_folder
from nemo_tsdkd.checks.start import check_weights
from nemo_tsdkd.config.compose import CONF
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.distributed.output import redirect_library_output
from nemo_tsdkd.distributed.progress import ProgressDisplay

GROUPS = CONF / "evaluate"
KEPT = ("results", "versions", "n-shot", "n-samples")  # of what the harness returns


def main(argv: Sequence[str] | None = None) -> None:
    """Score a Hugging Face folder and write the harness's results as JSON."""
    parser = argparse.ArgumentParser(prog="nemo-tsdkd evaluate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, such as `export` writes")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; an unfinished one is continued")
    parser.add_argument("--tasks", default="paper", help="a file of conf/evaluate, or task names joined by commas")
    parser.add_argument("--include-path", type=Path, help="folder of task files to use instead of the harness's")
    parser.add_argument("--limit", type=int, help="score the first N problems of each task only")
    parser.add_argument("--batch-size", default="8", help="sequences at once, or `auto`")
    parser.add_argument("--no-chat-template", action="store_true", help="give the prompts as they are: for base models")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="let tasks such as MBPP run, on this machine and unconfined, the code that the model writes",
    )
    args = parser.parse_args(argv)
    require_importable(args.model)
    require_safe(args.model)
    check_weights(args.model)
    if args.include_path and not args.include_path.is_dir():
        raise UserError(f"--include-path = {args.include_path}: no such folder. Give a folder of task YAML files.")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit = {args.limit}: must be at least 1. Leave it out to score every problem.")
    scores = _begun(args)
    tasks = [task for task in task_names(args.tasks) if task not in scores["tasks"]]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    log = args.output.with_name(f"{args.output.name}.log")
    done, total = len(scores["tasks"]), len(scores["tasks"]) + len(tasks)
    new: dict[str, dict[str, Any]] = {}
    with redirect_library_output(log), ProgressDisplay("task", total, done) as display:
        for task, results in evaluate(
            args.model,
            tasks,
            include_path=args.include_path,
            limit=args.limit,
            batch_size=args.batch_size,
            chat_template=not args.no_chat_template,
            allow_code_execution=args.allow_code_execution,
        ):
            scores["tasks"].append(task)
            for key in KEPT:
                scores[key] |= results[key]
            write_json(args.output, scores)
            new |= results["results"]
            display.show(len(scores["tasks"]), task)
    log.unlink(missing_ok=True)
    _print(new)
    print(args.output)


def _begun(args: argparse.Namespace) -> dict[str, Any]:
    """What `--output` holds of an evaluation with these settings, or an empty one."""
    settings = {
        "model": content_key(args.model),
        "limit": args.limit,
        "chat_template": not args.no_chat_template,
        "include_path": str(args.include_path) if args.include_path else None,
    }
    if not args.output.exists():
        return {"settings": settings, "tasks": [], **{key: {} for key in KEPT}}
    scores = read_json(args.output)
    if scores.get("settings") != settings:
        raise UserError(
            f"--output = {args.output}: holds scores of {scores.get('settings')}, not of {settings}. "
            "Choose another file, or the same settings to continue."
        )
    return scores


def _print(results: dict[str, dict[str, Any]]) -> None:
    for task, scores in results.items():
        for metric, value in scores.items():
            if isinstance(value, float) and "stderr" not in metric:
                print(f"{task}  {metric}  {value:.4f}", flush=True)


def task_names(tasks: str) -> list[str]:
    """Harness tasks of a group of conf/evaluate (`paper`), or the comma-separated names themselves."""
    group = GROUPS / f"{tasks}.yaml"
    return list(OmegaConf.load(group).values()) if group.is_file() else tasks.split(",")


def evaluate(
    model: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None,
    limit: int | None,
    batch_size: str,
    chat_template: bool,
    allow_code_execution: bool,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task's name and what the harness returns for it, for a Hugging Face folder that is loaded once.

    Raises:
        UserError: lm-eval is not installed, a task that the harness (or `include_path`) does not have, or one that
            runs the model's code without `allow_code_execution`.
    """
    if not tasks:
        return
    try:
        import lm_eval
        from lm_eval.api.registry import get_model
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UserError(f"evaluation needs lm-eval ({e}): pip install 'lm-eval[hf,ifeval]==0.4.13'.") from e
    import torch

    # The harness reads all its 14,000 task files: only if no --include-path replaces them.
    manager = TaskManager(
        include_path=str(include_path) if include_path else None, include_defaults=include_path is None
    )
    check_tasks(tasks, manager, allow_code_execution)
    if allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric requires it, too
    with transformers4_folder(model) as folder:
        loaded = get_model("hf")(
            pretrained=str(folder),
            dtype="auto",
            trust_remote_code=False,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=batch_size,
        )
    for task in tasks:
        yield (
            task,
            lm_eval.simple_evaluate(
                model=loaded,
                tasks=[task],
                limit=limit,
                apply_chat_template=chat_template,
                task_manager=manager,
                log_samples=False,
                confirm_run_unsafe_code=allow_code_execution,
            ),
        )


def check_tasks(tasks: Sequence[str], manager: Any, allow_code_execution: bool) -> None:
    """Raise UserError, before any model or data set is loaded, on a task that cannot or may not run."""
    unknown = [task for task in tasks if task not in manager.task_index]
    if unknown:
        raise UserError(
            f"--tasks: the harness has no {', '.join(unknown)}. List its names with `lm-eval ls tasks`, or give the "
            "folder of your own task files as --include-path."
        )
    runs_code = [task for task in tasks if (manager.task_index[task].cfg or {}).get("unsafe_code")]
    if runs_code and not allow_code_execution:
        raise UserError(
            f"--tasks: {', '.join(runs_code)} runs the code that the model writes on this machine. In a container "
            "that you can discard, add --allow-code-execution; else leave the task out."
        )

"""What `train` prints last: the best checkpoint, its score against the start, and what to do next. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from nemo_tsdkd.checkpoints.best import BEST, Scores, best_checkpoint
from nemo_tsdkd.checkpoints.manifest import CHECKPOINTS, newest_complete, step_of
from nemo_tsdkd.checkpoints.start_over import METRICS
from nemo_tsdkd.reporting.rows import read_metrics
from nemo_tsdkd.reporting.run_files import REPORT


def last_words(run_dir: Path) -> list[str]:
    """Lines on a run that has ended."""
    metrics = run_dir / METRICS
    rows = {int(row["step"]): row for row in read_metrics(metrics)} if metrics.is_file() else {}
    best = best_checkpoint(run_dir)
    lines, source = [], run_dir
    if best:
        folder, scores = best
        lines.append(f"best checkpoint: {folder}: {_score(scores, step_of(folder), rows)}{_at_start(scores, rows)}")
        overall, source = scores.best_step(), run_dir / BEST
        if overall is not None and overall != step_of(folder):
            lines.append(
                f"better was step {overall}, {_score(scores, overall, rows)}, whose checkpoint is not kept: "
                "checkpoint.keep_best=true keeps it"
            )
    elif newest := newest_complete(run_dir, deep=False):
        lines.append(f"newest checkpoint: {newest}")
    else:
        return [f"{run_dir / CHECKPOINTS} holds no complete checkpoint"]
    target = run_dir / "student-hf"
    lines.append(f"export it: nemo-tsdkd export --checkpoint {_word(source)} --to hf --output {_word(target)}")
    if (run_dir / REPORT).is_file():
        lines.append(f"report: {run_dir / REPORT}")
    return lines


def _word(path: Path) -> str:
    return shlex.quote(str(path))


def _at_start(scores: Scores, rows: Mapping[int, Mapping[str, float]]) -> str:
    return "" if scores.at(0) is None else f"; at the start {_score(scores, 0, rows)}"


def _score(scores: Scores, step: int, rows: Mapping[int, Mapping[str, float]]) -> str:
    """The score of a step in words, with its 95 % interval where it is an accuracy."""
    score, row = scores.at(step), rows.get(step, {})
    assert score is not None, "the caller asks for steps with a score"
    if not scores.higher_is_better:
        return f"{scores.metric} {score:.4g} nats a token"
    low, high = row.get(f"{scores.metric}_low"), row.get(f"{scores.metric}_high")
    interval = "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
    return f"{scores.metric} {score:.1%}{interval}"

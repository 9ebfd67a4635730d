"""Which checkpoint of a run is the best: the score of each validation, kept in every checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_tsdkd.checkpoints.atomic import read_json, write_json
from nemo_tsdkd.checkpoints.manifest import checkpoint_folders, has_manifest, step_of
from nemo_tsdkd.config.validation import UserError

logger = logging.getLogger(__name__)
SCORES = "validation.json"  # in a checkpoint's folder
BEST = "best"  # RUN/best names a run's checkpoint with the best score


@dataclass
class Scores:
    """The scores of a run's validations up to some step.

    Attributes:
        metric: the key in metrics.jsonl.
        of: digest of what a score depends on besides the model; scores compare where it is equal.
        higher_is_better: whether the best is the largest.
        scores: (step, score), ascending by step.
    """

    metric: str
    of: str
    higher_is_better: bool = True
    scores: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def read(cls, checkpoint: Path) -> Scores | None:
        """Those of a checkpoint; None if the run had no validation before it, or the file is damaged."""
        try:
            values = read_json(checkpoint / SCORES)
            scores = [(int(step), float(score)) for step, score in values["scores"]]
            return cls(str(values["metric"]), str(values["of"]), bool(values["higher_is_better"]), scores)
        except (UserError, KeyError, TypeError, ValueError):
            return None

    def write(self, checkpoint: Path) -> None:
        write_json(checkpoint / SCORES, asdict(self))

    def compares(self, other: Scores) -> bool:
        return (self.metric, self.of) == (other.metric, other.of)

    def at(self, step: int) -> float | None:
        """The score of the validation after `step`; None where there was none."""
        return dict(self.scores).get(step)

    def better(self, score: float, than: float) -> bool:
        return score > than if self.higher_is_better else score < than

    def best_step(self, steps: Sequence[int] | None = None) -> int | None:
        """The step with the best score, the first of equals, among all from 1 on (or among `steps`)."""
        found: tuple[int, float] | None = None
        for step, score in self.scores:
            if (step > 0 if steps is None else step in steps) and (found is None or self.better(score, found[1])):
                found = step, score
        return found[0] if found else None

    @property
    def without_improvement(self) -> int:
        """Validations since the best one, the one at the start included."""
        best, since = None, 0
        for _, score in self.scores:
            improved = best is None or self.better(score, best)
            best, since = (score, 0) if improved else (best, since + 1)
        return since

    def ends_run(self, step: int, patience: int) -> bool:
        """Whether `step` was validated and ends `patience` validations without a better one (0: never)."""
        return self.at(step) is not None and 0 < patience <= self.without_improvement


def best_of(checkpoints: Sequence[Path]) -> tuple[Path, Scores] | None:
    """The checkpoint with the best score among those that were validated, and the run's scores; None without any.

    What counts is the measure of the newest one, should the validation have changed in the meantime.
    """
    known = {folder: scores for folder in checkpoints if (scores := Scores.read(folder)) is not None}
    if not known:
        return None
    newest = known[max(known, key=step_of)]
    steps = [step_of(folder) for folder, scores in known.items() if scores.compares(newest)]
    best = newest.best_step(steps)
    return next(((folder, newest) for folder in known if step_of(folder) == best), None)


def best_checkpoint(run_dir: Path) -> tuple[Path, Scores] | None:
    """As `best_of`, among a run's complete checkpoints."""
    return best_of([folder for folder in checkpoint_folders(run_dir) if has_manifest(folder)])


def ended_early(checkpoint: Path, patience: int) -> bool:
    """Whether a run's newest checkpoint is its last, by `Scores.ends_run`."""
    scores = Scores.read(checkpoint)
    return scores is not None and scores.ends_run(step_of(checkpoint), patience)

"""The cells of a study, each kept in a file of its own: of the grid of learning rates, and of arms and seeds."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import ranks

from benchmarks.study import cell
from benchmarks.study.arms import ARMS
from benchmarks.study.models import CONF, Pair
from benchmarks.study.problems import held_out
from benchmarks.study.settings import Setting
from nemo_tsdkd.checkpoints.atomic import read_json, write_json
from nemo_tsdkd.checks.setup import check_setup
from nemo_tsdkd.config.compose import compose_config
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.reporting.provenance import git_state, installed_versions

THREADS = 1  # of a cell: its numbers depend on it
MINUTES = 20  # the longest that a cell may take
_COMPOSING = Lock()  # Hydra composes one configuration at a time


class Cell(NamedTuple):
    """One training: of an arm, with a seed, at a learning rate."""

    arm: str
    seed: int
    rate: float


@dataclass(frozen=True)
class Study:
    """Makes cells from a setting and its pair of models, and keeps them in `folder`."""

    setting: Setting
    pair: Pair
    folder: Path

    def grid(self, arms: Iterable[str]) -> list[dict[str, Any]]:
        """The rows of every arm's grid: trained with the grid's seed, scored on the validation split."""
        seed = self.setting.grid_seed
        return self.make([Cell(arm, seed, rate) for arm in arms for rate in self.setting.rates])

    def rate(self, arm: str) -> float:
        """The learning rate with the best accuracy on the validation split; of equals, the smallest."""
        rows = self.grid([arm])
        return max(rows, key=lambda row: (row["accuracy"], -row["lr"]))["lr"]

    def make(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """The row of each cell: the kept one, or else trained and scored now, as many at once as there are cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._row, cells))

    def baselines(self) -> list[dict[str, Any]]:
        """The scores of both models as they are."""
        student, teacher = self.pair.hf["student"], self.pair.hf["teacher"]
        about = {"seed": None, "split": "test", "steps": 0, "response_tokens": 0}
        return [
            {"arm": name, **about, **self._kept(f"{name}-{self.pair.digests[name]}", score), **self._provenance}
            for name, score in (
                ("student", lambda: self._score(student, teacher)),
                ("teacher", lambda: self._score(teacher, None)),
            )
        ]

    def decisions(self) -> list[dict[str, Any]]:
        """How often FP8 changes what the objective decides on (benchmarks/fp8_teacher.py)."""
        from benchmarks import fp8_teacher

        problems = held_out("validation", self.setting.validation_each)
        name = f"decisions-{'-'.join(self.pair.digests.values())}"
        rows = self._kept(name, lambda: {"rows": fp8_teacher.differences(self.pair.hf, problems)[0]})["rows"]
        about = {"seed": None, "split": "decisions", "accuracy": None, "steps": 0, "response_tokens": 0}
        return [{"arm": f"{row['model']} {row['precision']}", **about, **row} for row in rows]

    def _row(self, of: Cell) -> dict[str, Any]:
        return self._kept(f"{_name(of)}-{self._key(of)}", lambda: self.train(of))

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / "cells" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, make())
        return read_json(path)

    def train(self, of: Cell) -> dict[str, Any]:
        """Train a cell and score it: on the validation split for the grid, else on the test split too."""
        work = self.folder / "work" / _name(of)
        shutil.rmtree(work, ignore_errors=True)
        config = self._config(of, work / "run")
        run = partial(ranks.run_ranks, timeout=60 * MINUTES, meet=False)
        trained = run(cell.train_cell, 1, config, ARMS[of.arm].supervised)[0]
        about = {"arm": of.arm, "seed": of.seed, "lr": of.rate, "steps": config.max_steps}
        row = about | {"split": "validation", "accuracy": trained["curve"][-1]["accuracy"]} | trained | self._provenance
        if of.seed != self.setting.grid_seed:
            run(cell.export_cell, 1, work / "run", work / "hf")
            row |= {"split": "test", **self._score(work / "hf", self.pair.hf["teacher"])}
            row["digests"] = self.pair.digests | {"trained": cell.digest(work / "hf")}
        shutil.rmtree(work)
        return row

    def _score(self, model: Path, teacher: Path | None) -> dict[str, Any]:
        return ranks.run_ranks(cell.score, 1, model, teacher, self.setting.test_each, meet=False)[0]

    def _config(self, of: Cell, run_dir: Path) -> TrainConfig:
        arm, pair = ARMS[of.arm], self.pair
        paths = {
            "run_dir": run_dir,
            "student.path": pair.nemo["student"],
            "teacher.path": pair.nemo["teacher"],
            "data.path": pair.responses,
            "validation.path": pair.validation,
        }
        given = [*(f"{name}={path}" for name, path in paths.items()), f"seed={of.seed}", f"optim.lr={of.rate}"]
        if arm.precision:
            # Of the toy teacher's four layers two would stay in bf16; of a real one's, two of dozens.
            given += ["precision=bf16", "precision.first_last_layers_bf16=false", f"teacher.precision={arm.precision}"]
        with _COMPOSING:
            config = compose_config("study", [*given, *self.setting.overrides, *arm.overrides], CONF)
        check_setup(config)
        return config

    def _key(self, of: Cell) -> str:
        """Of what a cell's numbers depend on, the code of the package aside."""
        size = replace(self.setting, arms=(), seeds=(), rates=())
        parts = (ARMS[of.arm], self.pair.digests, size, (CONF / "study.yaml").read_text())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        versions = {"python": platform.python_version(), **installed_versions()}
        return {"git": git_state(), "cpu": _cpu(), "threads": THREADS, "versions": versions}


def _name(of: Cell) -> str:
    return f"{of.arm}-{of.seed}-{of.rate:g}"


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()

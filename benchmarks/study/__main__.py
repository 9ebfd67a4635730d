"""The study: published objectives and selection rules side by side, under one exact loss and one budget.

    python -m benchmarks.study [--setting full|smoke] [--runs runs/study] [--again ARM SEED]

Trains a teacher and a student on reasoning-gym problems, then every arm (arms.py) by the production code: first at each
learning rate of a small grid, chosen on the validation split, then with every seed; the trained models alone read the
test split, once. What is made is kept under `--runs`: a call goes on where the last one ended. Writes results.json and
the page docs/study.md with its plots (the smoke setting: under `--runs`). `--again` makes one cell anew and fails where
it differs from the committed one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the harness of ranks

import ranks

from benchmarks.study.arms import ARMS
from benchmarks.study.cells import THREADS, Cell, Study
from benchmarks.study.models import prepare, pretrained
from benchmarks.study.page import summaries, write_page
from benchmarks.study.settings import SETTINGS
from nemo_tsdkd.checkpoints.atomic import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "study" / "results.json"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="full")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", help="what is made and kept")
    parser.add_argument(
        "--again", nargs=2, metavar=("ARM", "SEED"), help="make a cell of results.json anew and compare"
    )
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    setting, folder = SETTINGS[args.setting], args.runs.absolute() / args.setting
    results, docs = (RESULTS, ROOT / "docs") if args.setting == "full" else (folder / "results.json", folder / "docs")
    models = pretrained(setting, folder)
    ranks.start_anew(["torch", "nemo_tsdkd.megatron.train"], [ROOT, ROOT / "tests"])
    study = Study(setting, prepare(setting, folder, models), folder)
    if args.again:
        compare(study, json.loads(results.read_text()), args.again[0], int(args.again[1]))
        return
    rows = [*study.baselines(), *make(study, [name for name in setting.arms if not ARMS[name].precision])]
    precise = [name for name in setting.arms if ARMS[name].precision]
    if precise:
        rate = study.rate("no_entropy")
        start_engine()
        rows += study.decisions()
        rows += make(study, precise, rate)
    rows += summaries(rows)
    write_json(results, rows)
    write_page(rows, docs, {name: ARMS[name].title for name in setting.arms}, "python -m benchmarks.study")


def start_engine() -> None:
    """From here on, ranks have Transformer Engine's own Python over the tests' stand-in of its kernels."""
    sys.path.append(str(ROOT / "tests" / "engine"))
    import te_stand_in

    te_stand_in.start_ranks()


def make(study: Study, arms: Sequence[str], rate: float | None = None) -> list[dict[str, Any]]:
    """The rows of these arms, at `rate` or each at the best of its grid."""
    grid = study.grid(arms) if rate is None else []
    rates = {arm: rate or study.rate(arm) for arm in arms}
    cells = [Cell(arm, seed, rates[arm]) for seed in study.setting.seeds for arm in arms]
    return grid + study.make(cells)


def compare(study: Study, rows: list[dict[str, Any]], arm: str, seed: int) -> None:
    """Train and score a cell once more. Exits with 1 where a number differs from its row, times aside."""
    before = next(row for row in rows if (row["arm"], row["seed"], row["split"]) == (arm, seed, "test"))
    if ARMS[arm].precision:
        start_engine()
    now = study.train(Cell(arm, seed, before["lr"]))
    fields = [name for name in now if name not in ("seconds", "git")]
    differ = [f"{name}: {before[name]} -> {now[name]}" for name in fields if before[name] != now[name]]
    print(
        *differ or [f"{arm}, seed {seed}: {len(fields)} fields are the same, the weights' digest among them"], sep="\n"
    )
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()

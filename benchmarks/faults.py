"""Kill training at random moments until it ends all the same: are the final weights those of a run without a kill?

    python benchmarks/faults.py [--kills 20] [--kills-per-run 5] [--seed 0] [--async-save] [--json FILE]

Two data-parallel ranks train a tiny student for ten steps, every other one on-policy on average, and save after every
second one. Each attempt gets SIGKILL on all ranks at a moment drawn evenly from the time an uninterrupted run takes
from its set-up to its end, and the next attempt resumes; after `--kills-per-run` kills a run may end. Its weights,
metrics and samples must then be the uninterrupted run's bit for bit, so no sample was lost or seen twice; the exit
status says whether they were.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the harness that starts ranks and kills them

import interruptions
import ranks
import tiny_run

from nemo_tsdkd.config.schema import TrainConfig

COLUMNS = "{:>4}{:>8}{:>10}{:>10}{:>10}{:>10}{:>12}"


def configure(models: Path, run_dir: Path, async_save: bool) -> TrainConfig:
    config = tiny_run.config(models, run_dir, world_size=2, lmbda=0.5)
    config.max_steps, config.checkpoint.every_n_steps = 10, 2
    config.checkpoint.async_save = async_save
    return config


def measure(root: Path, args: argparse.Namespace) -> Iterator[dict]:
    """One row a run."""
    models = root / "models"
    models.mkdir()
    tiny_run.prepare(models)
    reference = configure(models, root / "reference", args.async_save)
    expected = interruptions.train(reference)
    duration = (root / "reference" / "FINISHED").stat().st_mtime - interruptions.started_at(root / "reference")
    print(f"uninterrupted: {duration:.1f} s from set-up to end", flush=True)
    generator, kills, run = random.Random(args.seed), 0, 0
    while kills < args.kills:
        run += 1
        config = configure(models, root / f"run_{run}", args.async_save)
        planned = min(args.kills_per_run, args.kills - kills)
        start = time.monotonic()
        moments = [generator.uniform(0, duration) for _ in range(planned)]
        outcome, met = interruptions.train_through_kills(config, moments)
        kills += len(met)
        yield {
            "run": run,
            "kills": len(met),
            "in_set_up": met.count("set-up"),
            "in_training": met.count("training"),
            "in_saving": met.count("saving"),
            "seconds": time.monotonic() - start,
            "same": interruptions.same(outcome, expected),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-per-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async-save", action="store_true", help="checkpoint.async_save")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    ranks.PRELOAD = ["torch", "nemo_tsdkd.megatron.train"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), args):
            if not rows:
                print(COLUMNS.format("run", "kills", "set-up", "training", "saving", "seconds", "identical"))
            rows.append(row)
            *figures, seconds, same = row.values()
            print(COLUMNS.format(*figures, f"{seconds:.1f}", "yes" if same else "NO"), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    sys.exit(not all(row["same"] for row in rows))


if __name__ == "__main__":
    main()

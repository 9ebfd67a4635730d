"""Every configuration of conf/tsdkd_* as `nemo-tsdkd plan` sees it, beside the arithmetic of `check`.

    python benchmarks/plan.py [--names NAME ...] [--layers N] [--json FILE]

The models' weights are not needed: their shapes are those of nemo_tsdkd/checkpoints/shape.py. Prints for each
configuration the fullest stage's bytes both ways and the difference, without the 6 GiB that `check` adds, and the
estimate of a step's time on the assumptions of conf/hardware/h100.yaml. benchmarks/plan.json is what it wrote.
Experts are taken to get equal shares of the tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import planned

from nemo_tsdkd.checkpoints.shape import QWEN2_5, QWEN3
from nemo_tsdkd.config.compose import CONF, compose_config
from nemo_tsdkd.plan.hardware import Hardware
from nemo_tsdkd.plan.plan import plan_job

NAMES = sorted(path.stem for path in CONF.glob("tsdkd_*.yaml"))


def planned_configuration(name: str, folder: Path, layers: int | None = None, **settings: Any) -> dict[str, Any]:
    """The plan of a configuration, as JSON.

    Args:
        folder: for both models' config.json.
        layers: layers of each pipeline stage instead of the models' own.
    """
    sizes = re.fullmatch(r"tsdkd_(qwen3_)?(.+)_to_(.+?)(_long)?", name)
    assert sizes is not None
    family = QWEN3 if sizes[1] else QWEN2_5
    shapes = {which: family[sizes[at].upper().replace("_", "-")] for which, at in (("teacher", 2), ("student", 3))}
    paths = {which: planned.write_config(folder / name / which, shape) for which, shape in shapes.items()}
    config = compose_config(
        name, [*(f"{which}.path={path}" for which, path in paths.items()), f"run_dir={folder}", "data.path=none"]
    )
    stages = {which: config.layout_of(which).pipeline_model_parallel_size for which in shapes}
    fewer = {which: layers * stages[which] for which in shapes} if layers else None
    plan = plan_job(
        config,
        shapes,
        Hardware.read(),
        opener_share=config.objective.threshold,
        show=lambda acts: None,
        layers=fewer,
        **settings,
    )
    return plan.as_json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--layers", type=int, help="layers of a pipeline stage instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    plans = {}
    with TemporaryDirectory() as folder:
        for name in args.names:
            plan = plans[name] = planned_configuration(name, Path(folder), args.layers)
            stage = max(plan["stages"], key=lambda stage: stage["peak_gib"])
            peak, expected = stage["peak_gib"], stage["arithmetic_gib"]
            print(
                f"{name:24} plan {peak:6.2f} GiB, arithmetic {expected:6.2f} GiB, {peak / expected - 1:+6.1%}; "
                f"step {plan['time']['step']:6.1f} s, rollout {plan['time']['rollout']:6.1f} s",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(plans, indent=1) + "\n")


if __name__ == "__main__":
    main()

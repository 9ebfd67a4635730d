"""What TensorBoard, W&B and MLflow hold of a run, read back from their files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, struct.Struct("<IHB")  # LevelDB's log format, in which W&B writes a run while offline


def tensorboard_steps(run_dir: Path, metric: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars(metric)]


def wandb_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Each offline folder in the order they were begun: `run_id`, `config`, `rows` (steps with their values)."""
    from wandb.proto.wandb_internal_pb2 import Record

    attempts = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        attempt: dict[str, Any] = {"run_id": path.stem.removeprefix("run-"), "config": {}, "rows": {}}
        for content in _wandb_records(path.read_bytes()):
            record = Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                attempt["rows"][record.history.step.num] = {key: json.loads(value) for key, value in items.items()}
            elif kind in ("run", "config"):
                changes = record.run.config if kind == "run" else record.config
                attempt["config"] |= {item.key: json.loads(item.value_json) for item in changes.update if item.key}
        attempts.append(attempt)
    return attempts


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file; a torn one at the end of a killed run's is left out."""
    place, parts = 7, b""  # behind the file's own header
    while place + HEADER.size <= len(content):
        if BLOCK - place % BLOCK < HEADER.size:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, place)
        place += HEADER.size
        if not 1 <= kind <= 4 or place + length > len(content):
            return
        parts = content[place : place + length] if kind in (1, 2) else parts + content[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or its last part
            yield parts


def mlflow_run(run_dir: Path) -> tuple[Any, dict[str, list[int]], list[dict[str, Any]]]:
    """The one run of the file store: itself, the steps of each metric, the rows of its table of samples."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run_dir / "mlruns").as_uri())
    experiments = [client.get_experiment_by_name("nemo-tsdkd").experiment_id]
    (run,) = client.search_runs(experiments)
    steps = {key: [m.step for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
    table = json.loads((Path(run.info.artifact_uri.removeprefix("file://")) / "samples.json").read_text())
    return run, steps, [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

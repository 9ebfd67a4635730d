"""Lightning's loggers of TensorBoard, Weights & Biases and MLflow, as this package's runs use them.

Where they write to is said as in any other program: by WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI and the like.
Without them, into the run folder. None of them gets the environment, the command line or the console's output, where
keys and passwords may stand.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.reporting.loggers import SAMPLE_COLUMNS, OpenLogger
from nemo_tsdkd.reporting.provenance import ATTEMPTS
from nemo_tsdkd.reporting.rows import first_step

PROJECT = "nemo-tsdkd"
SAMPLES_TABLE = "samples.json"  # MLflow's artifact


def open_logger(config: TrainConfig, resume_step: int, name: str, run_id: str | None) -> OpenLogger:
    """Open the logger `name` for the run of `config`, whose provenance has been saved; `run_id` goes on with a run of
    it."""
    run_dir = Path(config.run_dir).absolute()
    if name == "tensorboard":
        return TensorBoard(run_dir, config, resume_step)
    return {"wandb": WeightsAndBiases, "mlflow": MLflow}[name](run_dir, config, run_id)


class TensorBoard:
    run_id = None
    purges = True

    def __init__(self, run_dir: Path, config: TrainConfig, resume_step: int) -> None:
        purge_step = first_step(resume_step)
        self.logger = TensorBoardLogger(str(run_dir), name="", version="tensorboard", purge_step=purge_step)
        self.logger.experiment.add_text("config", _fenced(OmegaConf.to_yaml(_settings(config))), resume_step)

    def log(self, step: int, values: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        self.logger.log_metrics(dict(values), step)
        if samples:
            texts = [_fenced("\n".join(f"{name}: {value}" for name, value in row.items())) for row in samples]
            self.logger.experiment.add_text("samples", "\n\n".join(texts), step)
        self.logger.experiment.flush()  # a killed run keeps what its last checkpoint holds

    def close(self, status: str) -> None:
        self.logger.experiment.close()


class WeightsAndBiases:
    purges = False

    def __init__(self, run_dir: Path, config: TrainConfig, run_id: str | None) -> None:
        import wandb

        # Metadata is the command line, the user, the host and every SLURM_ variable.
        quiet = {"silent": True, "console": "off", "x_disable_meta": True, "disable_git": True, "disable_code": True}
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.run_id = run_id or secrets.token_hex(4)
        self.logger = WandbLogger(
            name=run_dir.name,
            save_dir=str(run_dir),
            version=self.run_id,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            settings=wandb.Settings(**quiet),
        )
        self.logger.log_hyperparams(OmegaConf.to_container(_settings(config)) | {"versions": _versions(run_dir)})

    def log(self, step: int, values: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """In one call and with W&B's own step, which Lightning would begin at 0 again in each attempt."""
        import wandb

        row: dict[str, Any] = {**values, "trainer/global_step": step}
        if samples:
            row["samples"] = wandb.Table(list(SAMPLE_COLUMNS), data=[list(sample.values()) for sample in samples])
        self.logger.experiment.log(row, step=step, commit=True)

    def close(self, status: str) -> None:
        self.logger.experiment.finish(exit_code=int(status == "failed"))


class MLflow:
    purges = True  # it tells what it has, so a killed process leaves neither a gap nor a step logged twice

    def __init__(self, run_dir: Path, config: TrainConfig, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run_dir / "mlruns").as_uri()
            # Files need no server, nor SQLite on a shared disk.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.logger = MLFlowLogger(
            experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=run_dir.name,
            tracking_uri=uri,
            run_id=run_id,
        )
        self.client, self.run_id = self.logger.experiment, self.logger.run_id
        self._last: dict[str, int] = {}  # the last step of each metric that an earlier attempt logged
        self._last_samples = -1
        if run_id:
            self.client.update_run(run_id, status="RUNNING")
            for key in self.client.get_run(run_id).data.metrics:
                self._last[key] = max(metric.step for metric in self.client.get_metric_history(run_id, key))
            self._last_samples = self._step_of_last_samples()
        else:  # its parameters are of the first attempt and cannot change
            self.logger.log_hyperparams(OmegaConf.to_container(_settings(config)) | {"versions": _versions(run_dir)})
        attempt = max((run_dir / ATTEMPTS).glob("*.yaml"), default=run_dir / "config.yaml")
        self.client.log_artifact(self.run_id, str(attempt), ATTEMPTS)

    def log(self, step: int, values: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        if new := {key: value for key, value in values.items() if step > self._last.get(key, -1)}:
            self.logger.log_metrics(new, step)
        if samples and step > self._last_samples:
            table = {name: [sample[name] for sample in samples] for name in SAMPLE_COLUMNS}
            self.client.log_table(self.run_id, table, SAMPLES_TABLE)  # which it appends to

    def _step_of_last_samples(self) -> int:
        from mlflow.artifacts import load_dict

        if SAMPLES_TABLE not in [artifact.path for artifact in self.client.list_artifacts(self.run_id)]:
            return -1
        uri = self.client.get_run(self.run_id).info.artifact_uri
        table = load_dict(f"{uri}/{SAMPLES_TABLE}")
        return max((row[table["columns"].index("step")] for row in table["data"]), default=-1)

    def close(self, status: str) -> None:
        self.logger.finalize({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status])


def _settings(config: TrainConfig) -> Any:
    return OmegaConf.structured(config)


def _versions(run_dir: Path) -> dict[str, Any]:
    return read_json(run_dir / "versions.json")


def _fenced(text: str) -> str:
    """As code in Markdown: indented, so that nothing in the text can end it."""
    return "\n".join(f"    {line}" for line in text.splitlines())

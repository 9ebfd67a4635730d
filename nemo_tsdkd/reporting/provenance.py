"""Provenance of a run: each attempt's resolved configuration, package versions, git revision. No torch on import."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from nemo_tsdkd.checkpoints.atomic import write_atomically, write_json
from nemo_tsdkd.config.train_config import TrainConfig

PACKAGES = ("nemo-tsdkd", "torch", "nemo_toolkit", "megatron-core", "transformer-engine", "transformers")
ATTEMPTS = "attempts"  # subfolder of a run
_ABSENT = object()


def save_provenance(run_dir: str | Path, config: TrainConfig) -> None:
    """Write config.yaml (every field resolved) and versions.json (packages, git revision).

    `attempts/N.yaml` keeps the configuration of each attempt; config.yaml is that of the last one.
    """
    folder = Path(run_dir)
    (folder / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.structured(config)).encode()
    past = [int(p.stem) for p in (folder / ATTEMPTS).glob("*.yaml") if p.stem.isascii() and p.stem.isdecimal()]
    write_atomically(folder / ATTEMPTS / f"{max(past, default=0) + 1:04}.yaml", text)
    write_atomically(folder / "config.yaml", text)
    versions = {"python": platform.python_version(), **installed_versions(), "git": git_state()}
    write_json(folder / "versions.json", versions)


def changed_settings(run_dir: str | Path, config: TrainConfig) -> list[str]:
    """Fields that differ from those of the run's last attempt, each as "field: before -> now"; one line with a message
    if the last configuration cannot be read. Empty for a new run."""
    path = Path(run_dir, "config.yaml")
    if not path.exists():
        return []
    try:
        before = flat_settings(yaml.safe_load(path.read_bytes()))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return [f"{path} cannot be read: what has changed since the last attempt is not known"]
    now = flat_settings(OmegaConf.to_container(OmegaConf.structured(config)))
    return [
        f"{name}: {before.get(name, 'not there')} -> {now.get(name, 'not there')}"
        for name in dict.fromkeys([*now, *before])
        if name != "run_dir" and before.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]


def flat_settings(node: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration's values by the field's dotted name. Raises ValueError if `node` is no mapping."""
    if not isinstance(node, dict):
        raise ValueError("a configuration is a mapping")
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def git_state(source: Path = Path(__file__)) -> dict[str, str | bool]:
    """Revision of the checkout that holds `source`, and whether tracked files differ from it; else "unknown".

    A package installed inside some other project's checkout is not a part of that checkout: git must track `source`.
    """

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=source.parent, capture_output=True, text=True, timeout=30, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"revision": "unknown", "dirty": "unknown"}


def installed_versions() -> dict[str, str]:
    """Versions that must agree on every rank, by package; "absent" where it is not installed."""
    import torch

    found = {package: version_of(package) for package in PACKAGES}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"

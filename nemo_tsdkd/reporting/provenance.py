"""What made a run: its resolved configuration, the packages' versions, the git revision. Needs no torch to import."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import OmegaConf

from nemo_tsdkd.checkpoints.atomic import write_json, write_whole
from nemo_tsdkd.config.schema import TrainConfig

PACKAGES = ("nemo-tsdkd", "torch", "nemo_toolkit", "megatron-core", "transformer-engine", "transformers")


def save_provenance(run_dir: str | Path, config: TrainConfig) -> None:
    """Write what made the run: config.yaml (every field resolved) and versions.json (packages, git revision)."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    versions = {"python": platform.python_version(), **installed_versions(), "git": git_state()}
    write_json(folder / "versions.json", versions)


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

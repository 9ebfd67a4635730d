"""A checkpoint is whole or absent: folders that appear in one step, manifests that prove every byte.

A conversion is written beside its place, sealed with a manifest and renamed there. A training checkpoint is written by
many ranks into its final place; its manifest, written last, lists the size and digest of every file. A folder without
a manifest, or one whose files disagree with it, does not count.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from nemo_tsdkd.checkpoints.atomic import sync, write_whole

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # subfolder of a run; holds step_1, step_2, ...
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # mark in the folder of a checkpoint that is being written, or removed
_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_BLOCK = 1 << 22


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run_dir / CHECKPOINTS / f"step_{step}"


def newest_whole(run_dir: Path) -> Path | None:
    """The run's newest checkpoint whose every byte is as it was written; the log says which were passed over."""
    return first_whole(folders(run_dir)[::-1], find_damage)


def first_whole(candidates: Sequence[Path], damage_of: Callable[[Path], str | None]) -> Path | None:
    """The first folder without damage; the log says which were passed over."""
    for folder in candidates:
        damage = damage_of(folder)
        if damage is None:
            return folder
        logger.warning("%s is passed over: %s.", folder, damage)
    return None


def find_damage(folder: Path, part: int = 0, parts: int = 1, deep: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole. Reads all of it, several files at once.

    Of several `parts`, each reads the content of its share of the files. Not `deep`: names and sizes only.
    """
    if not has_manifest(folder):
        return "it was not written to its end (no manifest)"
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        if not entries:
            return "its manifest lists no file"
        return _find_change(folder, dict(sorted(entries.items())[part::parts]), deep)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    except OSError as error:  # a bad disk is no reason to give up the checkpoints before
        return f"it cannot be read ({error})"


def _find_change(folder: Path, entries: dict[str, Any], deep: bool) -> str | None:
    expected = {name: (entry["size"], entry["xxh3_128"]) for name, entry in entries.items()}
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if not deep:
        return None
    for name, value in zip(expected, digests([folder / name for name in expected]), strict=True):
        if value != expected[name][1]:
            return f"the content of {name} has changed"
    return None


def has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def contents(folder: Path) -> list[str]:
    """Names of the files that a manifest must list. One rank looks for all: on a network file system another may not
    yet see every file, and shares cut from unequal lists would leave some out."""
    beside = {folder / MANIFEST, folder / UNFINISHED}
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p not in beside)


def describe(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int | str]]:
    """Manifest entries of these files, once they are on the disk.

    Each rank takes every `world_size`-th name, and so reads what others wrote: what the disk holds, not its own cache.
    """
    paths = [folder / name for name in names]
    for path in paths:
        sync(path)
    sizes = [path.stat().st_size for path in paths]
    return {n: {"size": s, "xxh3_128": d} for n, s, d in zip(names, sizes, digests(paths), strict=True)}


def write_manifest(folder: Path, entries: dict[str, dict[str, int | str]]) -> None:
    """Write the manifest, from when on the checkpoint counts. Call it last, on one rank."""
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder, folder.parent]:
        sync(path)
    write_whole(folder / MANIFEST, json.dumps(entries, indent=1, sort_keys=True).encode())


def seal_folder(folder: Path) -> None:
    """Declare a folder whole that this process alone wrote: an import or an export. Reads it once."""
    write_manifest(folder, describe(folder, contents(folder)))


def folders(run_dir: Path) -> list[Path]:
    """All folders of a run's checkpoints, whole or not, linked ones too, by their steps. A file is no checkpoint."""
    named = [p for p in (run_dir / CHECKPOINTS).glob("step_*") if _STEP.fullmatch(p.name)]
    return sorted((p for p in named if p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step whose checkpoint the folder holds."""
    return int(folder.name.removeprefix("step_"))


def digests(paths: Sequence[Path]) -> list[str]:
    """128-bit xxh3 of each file's content, in hex: proof against damage and chance, not against an attacker."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()

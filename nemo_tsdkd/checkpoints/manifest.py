"""Manifests: they show whether a checkpoint is complete and undamaged.

A conversion writes a folder and its manifest under a temporary name and renames the folder. A training checkpoint is
written by many ranks into its final folder; its manifest, written last, lists the size and digest of every file. A
folder without a manifest, or one whose files differ from it, does not count.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from nemo_tsdkd.checkpoints.atomic import sync, write_atomically

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # subfolder of a run; holds step_1, step_2, ...
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # mark in the folder of a checkpoint that is being written, or removed
_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_BLOCK = 1 << 22


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run_dir / CHECKPOINTS / f"step_{step}"


def newest_complete(run_dir: Path, deep: bool = True) -> Path | None:
    """The run's newest complete and undamaged checkpoint; the log names those that it skips.

    Args:
        deep: as `find_damage`.
    """
    return first_complete(checkpoint_folders(run_dir)[::-1], partial(find_damage, deep=deep))


def first_complete(candidates: Sequence[Path], damage_of: Callable[[Path], str | None]) -> Path | None:
    """The first folder without damage; the log names those that it skips."""
    for folder in candidates:
        damage = damage_of(folder)
        if damage is None:
            return folder
        logger.warning("%s is skipped: %s.", folder, damage)
    return None


def find_damage(folder: Path, part: int = 0, parts: int = 1, deep: bool = True) -> str | None:
    """What is wrong with a checkpoint, as text; None if nothing is. Reads all of it, several files at once.

    Args:
        part, parts: read the content of files `part`, `part + parts`, ... only.
        deep: compare contents too, not names and sizes only.
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
    except OSError as error:  # after a bad disk, older checkpoints may still be good
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


def files_to_list(folder: Path) -> list[str]:
    """Names of the files that a manifest must list. One rank lists them for all: on a network file system another rank
    may not see every file yet, and shares of unequal lists would leave files out."""
    beside = {folder / MANIFEST, folder / UNFINISHED}
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p not in beside)


def manifest_entries(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int | str]]:
    """Manifest entries of these files, once they are on the disk.

    Each rank takes every `world_size`-th name, and so reads files of other ranks from the disk, not from its own cache.
    """
    paths = [folder / name for name in names]
    for path in paths:
        sync(path)
    sizes = [path.stat().st_size for path in paths]
    return {n: {"size": s, "xxh3_128": d} for n, s, d in zip(names, sizes, digests(paths), strict=True)}


def write_manifest(folder: Path, entries: dict[str, dict[str, int | str]]) -> None:
    """Write the manifest; from then on the checkpoint counts. Call it last, on one rank."""
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder, folder.parent]:
        sync(path)
    write_atomically(folder / MANIFEST, json.dumps(entries, indent=1, sort_keys=True).encode())


def add_manifest(folder: Path) -> None:
    """Write the manifest of a folder that this process alone wrote: an import or an export. Reads all files once."""
    write_manifest(folder, manifest_entries(folder, files_to_list(folder)))


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """All checkpoint folders of a run, sorted by step: complete or not, and links to folders."""
    named = [p for p in (run_dir / CHECKPOINTS).glob("step_*") if _STEP.fullmatch(p.name)]
    return sorted((p for p in named if p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def digests(paths: Sequence[Path]) -> list[str]:
    """128-bit xxh3 of each file's content, in hex. It finds damage; it does not stop an attacker."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()

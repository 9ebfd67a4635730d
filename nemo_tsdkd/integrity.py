"""A checkpoint is whole or absent: folders that appear in one step, manifests that prove every byte.

`os.replace` makes a finished folder appear at once, but a training checkpoint is written by many ranks into its
final place. Its manifest, written last, lists the size and digest of every file; a folder without one, or one whose
files disagree with it, does not count.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

_BLOCK = 1 << 22


def digest(path: Path) -> str:
    """128-bit xxh3 of a file's content, in hex: a check against damage and chance, not against an attacker."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def digests(paths: list[Path]) -> list[str]:
    """`digest` of every path, several files at once (hashing releases the GIL)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, paths))


@contextmanager
def appearing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` and rename it there when the block ends without an error.

    Nobody ever sees a part of it. Where another process was faster, its folder stays and this one is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier process with this number
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files and folders that appear in one step: a reader, and a crash, see the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_tsdkd.config.validation import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Put a file into its place at once and for good: readers, and crashes, leave the old content or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


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
        for path in [*partial.rglob("*"), partial]:
            sync(path)
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


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError with the file's name where it is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object.")
    return value


def write_json(path: Path, value: dict) -> None:
    """Strict JSON (NaN raises ValueError), in place at once."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

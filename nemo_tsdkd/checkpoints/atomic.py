"""Atomic writes of files and folders: a reader, also after a crash, sees the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from nemo_tsdkd.config.validation import UserError, is_of_the_host

_PROBE = 1 << 20  # bytes


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically and flush it to the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` and rename it there when the block ends without an error.

    No reader sees a part of it. If another process was faster, its folder stays and this one is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the process number: on a shared disk a process of another node may have the same one.
    partial = target.parent / f".{target.name}.{secrets.token_hex(8)}.partial"
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


@contextmanager
def detect_full_disk(folder: Path) -> Iterator[None]:
    """Replace an error by the disk's own if the folder's disk is full or over quota: libraries often hide that cause.

    Raises:
        OSError: the disk's error.
    """
    try:
        yield
    except BaseException as error:  # torch derives CheckpointException from it
        if isinstance(error, UserError | KeyboardInterrupt | SystemExit):
            raise
        probe = folder / f".probe_{socket.gethostname()}_{os.getpid()}"
        try:
            probe.write_bytes(bytes(_PROBE))
        except OSError as full:
            raise OSError(full.errno, full.strerror, str(folder)) from error
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        raise


def require_creatable(name: str, folder: Path) -> None:
    """Raise UserError unless `folder`, the value of the option or field `name`, is writable or can be created."""
    shown = f"{name} = {str(folder)!r}"
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # a name too long; a zero byte
        raise UserError(f"{shown}: cannot be a folder's name ({error}). Choose another.") from error
    if not there.is_dir():
        raise UserError(f"{shown}: {there} is not a folder. Choose another place.")
    try:
        TemporaryFile(dir=there).close()  # not os.access, which ignores read-only mounts for root
    except OSError as error:
        if is_of_the_host(error):
            raise
        raise UserError(f"{shown}: {there} cannot be written to ({error.strerror}). Choose another place.") from error


def sync(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError with the file's name if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the second: bytes, syntax, numbers of 5,000 digits
        if is_of_the_host(error):
            raise
        raise UserError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object.")
    return value


def write_json(path: Path, value: dict) -> None:
    """Write strict JSON (NaN raises ValueError) atomically."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

"""`run.json`, in a run's folder and in each of its checkpoints: the run's id, and digests of student and tokenizer.

A run removes only checkpoints with its id (`retention.py`). A resume compares the digests of student and tokenizer, not
their paths.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from nemo_tsdkd.checkpoints.atomic import read_json, write_json
from nemo_tsdkd.checkpoints.manifest import digests
from nemo_tsdkd.config.validation import UserError

RECORD = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """A run's id, and digests of the student it began with and of its tokenizer."""

    run: str
    student: str
    tokenizer: str

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """The record of a run or checkpoint folder; None if it is absent or damaged."""
        try:
            values = read_json(folder / RECORD)
            return cls(**{name: str(values[name]) for name in ("run", "student", "tokenizer")})
        except (UserError, KeyError):
            return None

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))


def open_record(run_dir: Path, checkpoint: Path | None, student: str, tokenizer: str) -> RunRecord:
    """The run's record, created at its first start. Call it on one rank, which holds the run's lock.

    Args:
        checkpoint: the one to resume from; None at step 1.
        student, tokenizer: digests of the configured student and tokenizer.

    Raises:
        UserError: the checkpoint was trained from another student or for another tokenizer.
    """
    known = (RunRecord.read(checkpoint) if checkpoint else None) or RunRecord.read(run_dir)
    given = RunRecord(secrets.token_hex(8), student, tokenizer)
    if known:
        for what in ("tokenizer", "student"):
            if checkpoint and getattr(known, what) != getattr(given, what):
                raise UserError(
                    f"student.path: its {what} is not the one that this run began with (digests "
                    f"{getattr(given, what)} and {getattr(known, what)}). Give that {what}, or another run_dir."
                )
        given = replace(given, run=known.run)
    if given != RunRecord.read(run_dir):
        given.write(run_dir)
    return given


def student_digest(checkpoint: Path) -> str:
    """Digest of a NeMo checkpoint's tensors, equal for each import of one model (the index file is not)."""
    paths = sorted((checkpoint / "weights").glob("*.distcp"))
    return content_digest(dict(zip((p.name for p in paths), digests(paths), strict=True)))


def content_digest(value: dict) -> str:
    """Digest of a value that JSON can hold; the order of keys does not matter."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=True).encode())

"""What a run is, in `run.json` of its folder and of each of its checkpoints: its own number and the student it trains.

Deletion asks for the number (`retention.py`): a checkpoint without it is not the run's to remove. A resume asks for the
student and the tokenizer, by their content: where they lie does not matter.
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
    """A run's number, and digests of the student it began with and of its tokenizer."""

    run: str
    student: str
    tokenizer: str

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """That of a run or checkpoint folder; None where there is none, or a damaged one."""
        try:
            values = read_json(folder / RECORD)
            return cls(**{name: str(values[name]) for name in ("run", "student", "tokenizer")})
        except (UserError, KeyError):
            return None

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))


def open_record(run_dir: Path, checkpoint: Path | None, student: str, tokenizer: str) -> RunRecord:
    """The run's record, made at its first start. Call it on one rank, which holds the run's lock.

    Args:
        checkpoint: the one to resume from; None where the run begins.
        student, tokenizer: digests of what the configuration names.

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
    """Digest of a NeMo checkpoint's tensors, equal for each import of one model. (The index beside them is not.)"""
    paths = sorted((checkpoint / "weights").glob("*.distcp"))
    return content_digest(dict(zip((p.name for p in paths), digests(paths), strict=True)))


def content_digest(value: dict) -> str:
    """Digest of what can be written as JSON, in any order of its keys."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=True).encode())

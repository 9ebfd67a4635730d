"""Whether `data.path` is something to read: looks at names only, so that a login node can ask."""

from __future__ import annotations

from pathlib import Path

from nemo_tsdkd.config.schema import DataConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.response_shards import missing_files

SUFFIXES = (".jsonl", ".parquet")


def check_data(data: DataConfig) -> None:
    """Raise UserError unless `data.path` is a whole folder or file, or may be a hub data set's name."""
    path = Path(data.path)
    if path.exists():
        for name in ("subset", "split"):
            if getattr(data, name) != getattr(DataConfig, name):
                raise UserError(
                    f"data.{name} = {getattr(data, name)!r}: only a hub data set has one, and {data.path} is local. "
                    "Leave it out."
                )
        if path.is_dir() and (absent := missing_files(path)):
            raise UserError(
                f"data.path = {data.path!r}: `generate` has not ended, {len(absent)} files are missing ({absent[0]}). "
                "Wait for its job, or submit it again: it goes on."
            )
    elif path.suffix in SUFFIXES or path.is_absolute():
        raise UserError(f"data.path = {data.path!r}: there is no such file. Give a .jsonl or .parquet file.")


def data_files(data: DataConfig) -> list[Path]:
    """The files of a `data.path` that exists. Raises UserError where there is none, or one of another format."""
    path = Path(data.path)
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.path = {data.path!r}: the folder holds no .jsonl or .parquet file.")
    if path.suffix not in SUFFIXES and not path.is_dir():
        raise UserError(f"data.path = {data.path!r}: a file must end in .jsonl or .parquet. Rename or convert it.")
    return files

"""Check `data.path` by names only, so that it works on a login node."""

from __future__ import annotations

from pathlib import Path

from nemo_tsdkd.config.schema import DataConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.response_shards import missing_files

SUFFIXES = (".jsonl", ".parquet")


def check_data(data_config: DataConfig) -> None:
    """Raise UserError unless `data.path` is a file, a folder with all its files, or possibly a hub data set's name."""
    path = Path(data_config.path)
    if path.exists():
        for name in ("subset", "split"):
            if getattr(data_config, name) != getattr(type(data_config), name):
                raise UserError(
                    f"{data_config.section}.{name} = {getattr(data_config, name)!r}: only a hub data set has one, and "
                    f"{data_config.path} is local. Leave it out."
                )
        if path.is_dir() and (absent := missing_files(path)):
            raise UserError(
                f"{data_config.named()}: `generate` has not ended, {len(absent)} files are missing "
                f"({absent[0]}). Wait for its job, or submit it again: it goes on."
            )
    elif path.suffix in SUFFIXES or path.is_absolute():
        raise UserError(f"{data_config.named()}: there is no such file. Give a .jsonl or .parquet file.")


def data_files(data_config: DataConfig) -> list[Path]:
    """The files of an existing `data.path`. Raises UserError if there is none, or one of another format."""
    path = Path(data_config.path)
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{data_config.named()}: the folder holds no .jsonl or .parquet file.")
    if path.suffix not in SUFFIXES and not path.is_dir():
        raise UserError(f"{data_config.named()}: a file must end in .jsonl or .parquet. Rename or convert it.")
    return files

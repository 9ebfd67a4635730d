"""A folder of responses in files that appear complete or not at all, so that an interrupted job can continue."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_tsdkd.checkpoints.atomic import read_json, write_atomically
from nemo_tsdkd.config.integers import ceil_div
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError

FORMATS = ("jsonl", "parquet")
_SETTINGS = "settings.json"
_ROLLOUT = ("max_new_tokens", "temperature", "top_k", "top_p")  # what a response depends on
_LARGEST = 1024  # prompts a file, where the user does not say


class Shards:
    """A folder `responses-00000.jsonl`, ... with `size` prompts a file, in the order of the data set.

    Without a `size` an opened folder keeps its own, and a new one's files leave no copy of the model without work.

    A record holds `index, prompt, response, response_ids, truncated`. The token ids are what was sampled; the text,
    tokenized anew, may be cut in other places.
    """

    def __init__(self, folder: Path, format: str, size: int = 0) -> None:
        self.folder, self.format, self.size = folder, format, size

    def claim(self, config: TrainConfig, model: str, rows: int, copies: int) -> None:
        """Open the folder for these settings, or check that it was opened for them. Call it on one rank.

        Args:
            rows: prompts in the data set.
            copies: of the model, each of which writes one file at a time.

        Raises:
            UserError: the folder holds responses written with other settings.
        """
        path = self.folder / _SETTINGS
        written = read_json(path) if path.exists() else {}
        if not self.size:
            self.size = written["shards"]["size"] if written else _even_size(rows, copies)
        rollout = asdict(config.rollout)
        settings = {
            "model": {"which": model, "path": getattr(config, model).path},
            "data": asdict(config.data),
            "rollout": {name: rollout[name] for name in _ROLLOUT},
            "seed": config.seed,
            "shards": {"format": self.format, "size": self.size},
            "rows": rows,
        }
        for name, value in written.items():
            if settings[name] != value:
                raise UserError(
                    f"--output = {self.folder}: was written with {name} = {value}, not {settings[name]}. "
                    "Choose another folder, or the same settings to continue."
                )
        if not written:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(settings, indent=1).encode())

    def missing(self, rows: int) -> list[int]:
        """Numbers of the shards of `rows` prompts that are not there yet."""
        return [shard for shard in range(ceil_div(rows, self.size)) if not self._path(shard).exists()]

    def rows_of(self, shard: int, rows: int) -> range:
        """Indices of one shard's prompts, of `rows` in all."""
        return range(shard * self.size, min((shard + 1) * self.size, rows))

    def write(self, shard: int, records: list[dict[str, Any]]) -> None:
        """Write one shard: its file appears complete or not at all."""
        if self.format == "jsonl":
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        else:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(records), sink)
            content = sink.getvalue().to_pybytes()
        write_atomically(self._path(shard), content)

    def _path(self, shard: int) -> Path:
        return self.folder / f"responses-{shard:05}.{self.format}"


def missing_files(folder: Path) -> list[str]:
    """Names of the files that an unfinished folder of responses lacks; none for a folder of other data."""
    path = folder / _SETTINGS
    settings = read_json(path) if path.exists() else {}
    if not settings.keys() >= {"shards", "rows"}:
        return []
    shards = Shards(folder, **settings["shards"])
    return [shards._path(shard).name for shard in shards.missing(settings["rows"])]


def _even_size(rows: int, copies: int) -> int:
    """At most _LARGEST, and as many files for every copy."""
    files = copies * ceil_div(rows, copies * _LARGEST)
    return ceil_div(rows, files)

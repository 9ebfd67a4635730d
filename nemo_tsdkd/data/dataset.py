"""Read, check and tokenize prompts and responses once at set-up; draw them in a reproducible order."""

from __future__ import annotations

import json
import logging
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pyarrow.compute import list_value_length
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nemo_tsdkd.config.schema import DataConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.rows import encode_row, require_template
from nemo_tsdkd.data.source import check_data, data_files
from nemo_tsdkd.data.tokenizer import Vocabulary
from nemo_tsdkd.distributed.output import terminal

log = logging.getLogger(__name__)

ENCODED = datasets.Features(
    prompt_json=datasets.Value("string"),
    prompt_ids=datasets.Sequence(datasets.Value("int32")),
    response_ids=datasets.Sequence(datasets.Value("int32")),
)


@dataclass(frozen=True)
class Sample:
    """One prompt as token ids. `response_ids` ends with its first EOS, or has none where it was cut off by a limit; it
    is empty where the data's response is not needed. `index` is the row's in a data set, the draw's in `EpochOrder`."""

    index: int
    prompt_ids: list[int]
    response_ids: list[int]


class PromptDataset(Dataset[Sample]):
    """The usable rows of one data set in file order. `dropped` rows did not fit into `seq_length`."""

    def __init__(self, rows: datasets.Dataset, dropped: int = 0) -> None:
        self.rows = rows
        self.dropped = dropped

    @classmethod
    def load(
        cls, data_config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary | None = None
    ) -> PromptDataset:
        """Read `data_config.path`, check every row and tokenize it.

        A prompt longer than `seq_length - 1` leaves no room for a response token, and a response that needs more
        than `seq_length` together with its prompt would lose its end: both are dropped and counted, never cut.

        Args:
            vocabulary: of the tokenizer, if responses are needed; a response is read up to its first EOS.

        Raises:
            UserError: no such file or hub data set, a bad row (with file and line), a tokenizer without chat
                template, or no usable row.
        """
        require_template(data_config, tokenizer)
        with redirect_stderr(terminal()):  # its bar, where a user looks
            encoded = datasets.concatenate_datasets(
                [
                    rows.map(
                        encode_row,
                        with_indices=True,
                        fn_kwargs=dict(
                            source=source, data_config=data_config, tokenizer=tokenizer, vocabulary=vocabulary
                        ),
                        remove_columns=rows.column_names,
                        features=ENCODED,
                        desc=f"Tokenizing {source}",
                    )
                    for source, rows in open_rows(data_config)
                ]
            )
        prompt, response = (
            list_value_length(encoded.data.column(name)).to_numpy() for name in ("prompt_ids", "response_ids")
        )
        total = prompt + response
        long_prompt = prompt > data_config.seq_length - 1
        keep = np.flatnonzero(~long_prompt & (total <= data_config.seq_length))
        dropped = len(encoded) - len(keep)
        log.info(
            "data: %d rows of %s; dropped %d whose prompt and %d whose response does not fit into seq_length %d",
            *(len(encoded), data_config.path, long_prompt.sum(), dropped - long_prompt.sum(), data_config.seq_length),
        )
        if len(keep) == 0:
            raise UserError(
                f"{data_config.named()}: no usable row ({dropped} dropped for data.seq_length = "
                f"{data_config.seq_length}). Give a file with rows, or a larger seq_length."
            )
        return cls(encoded.select(keep), dropped)

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, i: int) -> str | list[dict[str, str]]:
        """The prompt of row `i` as the data has it: text, or chat messages."""
        return json.loads(self.rows[i]["prompt_json"])

    def __getitem__(self, i: int) -> Sample:
        row = self.rows[i]
        return Sample(i, row["prompt_ids"], row["response_ids"])


class EpochOrder(Dataset[Sample]):
    """`total_samples` draws from `dataset`: each epoch is a new permutation of all its rows.

    Draw `i` depends on `(seed, i)` alone, so a run resumes at `consumed_samples` on any layout.
    `Sample.index` is the number of the draw, a key for the sampler's noise: no two draws of a run share it.

    With `repeats` each `block` of draws (a global batch) comes that many times in a row, for `rollout.reuse`. Repeats
    are the same draws and have the same indices; without repeats draw `i` has index `i`.
    """

    def __init__(
        self, dataset: Dataset[Sample], total_samples: int, seed: int, *, block: int = 1, repeats: int = 1
    ) -> None:
        self.dataset = dataset
        self.total_samples = total_samples
        self.seed = seed
        self.block = block
        self.repeats = repeats
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.total_samples

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.total_samples:
            raise IndexError(i)
        i = i // (self.block * self.repeats) * self.block + i % self.block
        epoch, position = divmod(i, len(self.dataset))  # type: ignore[arg-type]
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))  # type: ignore[arg-type]
        return replace(self.dataset[int(self._order[position])], index=i)


def open_rows(data_config: DataConfig) -> list[tuple[str, datasets.Dataset]]:
    """(name for messages, first `limit` rows) of each file of `data.path`, or of the hub data set."""
    check_data(data_config)
    if Path(data_config.path).exists():
        parts = [(str(file), _read_file(file, data_config)) for file in data_files(data_config)]
    else:
        parts = [(data_config.path, _read_hub(data_config))]
    left = data_config.limit if data_config.limit is not None else sum(len(rows) for _, rows in parts)
    taken = []
    for source, rows in parts:
        taken.append((source, rows.select(range(min(left, len(rows))))))
        left -= len(taken[-1][1])
    return taken


def _read_file(path: Path, data_config: DataConfig) -> datasets.Dataset:
    if path.suffix == ".parquet":
        builder: dict[str, Any] = {"path": "parquet"}
    else:
        # As text: `json` guesses types (a prompt that is a date becomes a timestamp) and forgets line numbers.
        builder = {"path": "text", "features": datasets.Features(text=datasets.Value("string"))}
    try:
        return datasets.load_dataset(**builder, data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as e:
        raise UserError(
            f"{data_config.named(path)}: is empty or cannot be read as {path.suffix} ({e.__cause__ or e})."
        ) from e


def _read_hub(data_config: DataConfig) -> datasets.Dataset:
    try:
        return datasets.load_dataset(data_config.path, data_config.subset, split=data_config.split)
    except (ConnectionError, FileNotFoundError, ValueError) as e:  # the last: no such subset or split
        raise UserError(
            f"{data_config.named()} (subset {data_config.subset}, split {data_config.split}): neither "
            f"a local file nor a data set that the hub gives out ({e}). "
            "Check the name, or download it first and give the .jsonl or .parquet file."
        ) from e

"""The held-out prompts of a validation, with what each response is compared with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.dataset import Sample, open_rows
from nemo_tsdkd.data.rows import check_rows, encode_row, named_row, require_template
from nemo_tsdkd.verifiers import NONE, VERIFIERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """A held-out prompt. `reference` is what the verifier made of the row's answer; None without a verifier."""

    index: int  # of its row
    prompt_ids: list[int]
    reference: Any

    @property
    def sample(self) -> Sample:
        return Sample(self.index, self.prompt_ids, [])


def load_held_out(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """The usable rows of `validation.path` in file order. A prompt that fills `data.seq_length` is dropped and counted.

    Raises:
        UserError: no such file or hub data set, a bad row (with file and line), a tokenizer without chat template, or
            no usable row.
    """
    data = config.validation.data(config.data)
    require_template(data, tokenizer)
    read, problems, total = _reader(config), [], 0
    for source, rows in open_rows(data):
        for i, row in enumerate(rows):
            encoded = encode_row(row, i, source=source, data_config=data, tokenizer=tokenizer, vocabulary=None)
            if len(encoded["prompt_ids"]) < data.seq_length:
                reference = read(*named_row(row, i, source))
                problems.append(Problem(total + i, encoded["prompt_ids"], reference))
        total += len(rows)
    dropped = total - len(problems)
    if not problems:
        raise UserError(
            f"{data.named()}: no usable row ({dropped} dropped for data.seq_length = {data.seq_length}). "
            "Give a file with rows, or a larger seq_length."
        )
    said = "validation: %d rows of %s; dropped %d whose prompt does not fit into data.seq_length %d"
    logger.info(said, total, data.path, dropped, data.seq_length)
    return problems


def check_held_out(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Check the first held-out rows; False, without a check, for a data set of the hub.

    Raises:
        UserError: as `load_held_out`.
    """
    return check_rows(config.validation.data(config.data), tokenizer, None, _reader(config))


def held_out_digest(problems: list[Problem]) -> str:
    """Digest of prompts and references: scores are comparable where it is equal."""
    return xxhash.xxh3_64_hexdigest(repr([(p.prompt_ids, p.reference) for p in problems]).encode())


def _reader(config: TrainConfig) -> Any:
    """From a row and its name to its reference."""
    column, name = config.validation.answer_column, config.validation.verifier
    verifier = None if name == NONE else VERIFIERS[name].make()

    def read(row: dict[str, Any], where: str) -> Any:
        if verifier is None:
            return None
        if column not in row:
            raise UserError(f"{where}: no column {column!r} among {sorted(row)}. Set validation.answer_column.")
        try:
            return verifier.reference(row[column])
        except ValueError as error:
            raise UserError(
                f"{where}: {column} = {row[column]!r:.80}: {error}. Correct or remove the row, or choose another "
                "validation.verifier."
            ) from error

    return read

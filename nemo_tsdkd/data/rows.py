"""Check and tokenize one row of a data set, and check the first rows of every file before a job waits for GPUs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from nemo_tsdkd.config.schema import DataConfig
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.data.source import check_data, data_files
from nemo_tsdkd.data.tokenizer import Vocabulary, response_text

_ROWS, _FILES = 8, 8  # the first rows of the first files


def check_rows(
    data_config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary | None,
    check: Callable[[dict[str, Any], str], object] = lambda row, where: None,
) -> bool:
    """Encode the first rows of the data as training does; False, without a check, for a data set of the hub.

    Args:
        vocabulary: of the tokenizer, if responses are needed.
        check: is called with each of these rows and its name for messages, and raises UserError on a bad one.

    Raises:
        UserError: a file that cannot be read, or a bad row (with file and line).
    """
    check_data(data_config)
    require_template(data_config, tokenizer)
    if not Path(data_config.path).exists():
        return False
    for file in data_files(data_config)[:_FILES]:
        rows = list(itertools.islice(_read(file, data_config), min(_ROWS, data_config.limit or _ROWS)))
        if not rows:
            raise UserError(f"{data_config.named(file)}: is empty. Give a file with rows.")
        for index, row in enumerate(rows):
            encode_row(
                row, index, source=str(file), data_config=data_config, tokenizer=tokenizer, vocabulary=vocabulary
            )
            check(*named_row(row, index, str(file)))
    return True


def require_template(data_config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where a chat template is asked for and the tokenizer has none."""
    if data_config.apply_chat_template and tokenizer.chat_template is None:
        raise UserError(
            "data.apply_chat_template = True: the tokenizer has no chat template. Set it to false for a base model."
        )


def _read(file: Path, data_config: DataConfig) -> Iterator[dict[str, Any]]:
    """A file's rows as `datasets` gives them: the columns of a Parquet file, the text of a line."""
    try:
        if file.suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(_ROWS):
                yield from batch.to_pylist()
        else:
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    yield {"text": line.rstrip("\n")}
    except (UnicodeDecodeError, pa.ArrowException, OSError) as error:
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{data_config.named(file)}: cannot be read as {file.suffix} ({said}).") from error


def encode_row(
    row: dict[str, Any],
    index: int,
    *,
    source: str,
    data_config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary | None,
) -> dict[str, Any]:
    """The prompt as JSON (text, or a list of chat messages) and the tokens of the row `index` (from 0) of `source`, a
    file or data set.

    Raises:
        UserError: the row cannot be used, with file and line.
    """
    row, where = named_row(row, index, source)
    column = data_config.prompt_column
    if column == "prompt" and "prompt" not in row and "instruction" in row:
        column = "instruction"  # the name in half of the public instruction data
    prompt: str | list[dict[str, str]]
    if isinstance(row.get(column), list):
        prompt = messages = _messages(row[column], f"{where}: {column}", data_config)
    else:
        prompt = _text(row, column, where, data_config.section)
        messages = [{"role": "user", "content": prompt}]
    if data_config.apply_chat_template:
        try:
            prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(
                f"{where}: the tokenizer's chat template fails on the prompt ({type(error).__name__}: {error!s:.120}). "
                "Mend the template or the row, or set data.apply_chat_template=false."
            ) from error
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
    if not prompt_ids:
        raise UserError(f"{where}: {column} = {prompt!r:.80}: gives no token. Correct or remove the row.")
    response_ids = _response_ids(row, data_config, tokenizer, vocabulary, where) if vocabulary else []
    return {"prompt_json": json.dumps(prompt), "prompt_ids": prompt_ids, "response_ids": response_ids}


def _messages(value: list[Any], where: str, data_config: DataConfig) -> list[dict[str, str]]:
    """A chat as the tokenizer's template takes it. Raises UserError unless it is one that the model can answer."""
    if not data_config.apply_chat_template:
        raise UserError(
            f"{where} is a list of chat messages, which needs the tokenizer's chat template. "
            f"Set {data_config.section}.apply_chat_template=true, or give text."
        )
    messages = []
    for number, message in enumerate(value, start=1):
        given = {key: x for key, x in message.items() if x is not None} if isinstance(message, dict) else {}
        if given.keys() != {"role", "content"} or not all(isinstance(x, str) for x in given.values()):
            raise UserError(
                f"{where}: message {number} is {message!r:.80}: must hold role and content, both text, and nothing "
                "else. Correct or remove the row."
            )
        messages.append({"role": given["role"], "content": _printable(given["content"], f"{where}: message {number}")})
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["user"] or not set(roles) <= {"system", "user", "assistant"}:
        raise UserError(
            f"{where}: has messages of the roles {roles}: must be of system, user and assistant, and the last of the "
            "user. Correct or remove the row."
        )
    return messages


def named_row(row: dict[str, Any], index: int, source: str) -> tuple[dict[str, Any], str]:
    """The columns of the row `index` (from 0) of `source`, and its name for messages. Raises UserError as
    `encode_row`."""
    is_json = source.endswith(".jsonl")
    where = f"{source}, {'line' if is_json else 'row'} {index + 1}"
    return _parse_line(row["text"], where) if is_json else row, where


def _response_ids(
    row: dict[str, Any], data_config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, where: str
) -> list[int]:
    if "response_ids" in row:
        return vocabulary.first_response(_generated_ids(row, data_config, tokenizer, vocabulary, where))
    text = _text(row, data_config.response_column, where)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return vocabulary.first_response([*ids, tokenizer.eos_token_id])


def _generated_ids(
    row: dict[str, Any], data_config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, where: str
) -> list[int]:
    """The tokens that `nemo-tsdkd generate` sampled: a truncated response has no EOS, and tokenizing the text
    again may give other tokens."""
    ids = row["response_ids"]
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary.size for i in ids):
        raise UserError(
            f"{where}: response_ids = {ids!r:.80}: must be a list of token ids below {vocabulary.size}. "
            "Remove the column, so that the text is tokenized."
        )
    if response_text(tokenizer, ids) != row.get(data_config.response_column):
        raise UserError(
            f"{where}: response_ids are not the tokens of {data_config.response_column!r} for this tokenizer. "
            "Remove the column, so that the text is tokenized."
        )
    return ids


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:  # the first also for numbers of 5,000 digits
        raise UserError(f"{where}: not JSON ({e}). Each line must hold one JSON object.") from e
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds a {type(row).__name__}. Each line must hold one JSON object.")
    return row


def _text(row: dict[str, Any], column: str, where: str, section: str = "data") -> str:
    if column not in row:
        columns = f"{section}.prompt_column/{'response' if section == 'data' else 'answer'}_column"
        raise UserError(f"{where}: no column {column!r} among {sorted(row)}. Set {columns}.")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column} = {value!r:.80}: must be text and not empty. Correct or remove the row.")
    return _printable(value, f"{where}: {column}")


def _printable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:  # JSON can write down half of a surrogate pair; no text can hold it
        raise UserError(
            f"{where} holds {text[e.start]!r} at character {e.start}: not a character. Correct the row."
        ) from e
    return text

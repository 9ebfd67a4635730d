"""The tokenizer of both models: load it from a checkpoint's folder, compare two, and find the true vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS
from nemo_tsdkd.checkpoints.run_record import content_digest
from nemo_tsdkd.checkpoints.transformers5 import transformers4_folder
from nemo_tsdkd.config.validation import UserError


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of the tokenizer. A model's rows and logit columns from `size` on are padding."""

    size: int
    pad_id: int
    eos_ids: tuple[int, ...]  # every id that ends a response

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Vocabulary:
        """The vocabulary of the tokenizer in `path`. Responses end with its EOS or an EOS of `generation_config.json`.

        Raises:
            UserError: the tokenizer has no EOS, or the file names an id that it does not have.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(f"{path}: its tokenizer has no EOS token, so no response could end. Set eos_token.")
        ids = [tokenizer.eos_token_id]
        folder = tokenizer_folder(path)
        if (folder / "generation_config.json").exists():
            extra = read_json(folder / "generation_config.json").get("eos_token_id")
            ids += extra if isinstance(extra, list) else [extra]
        eos_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
        size = 1 + max(tokenizer.get_vocab().values())
        if bad := [i for i in eos_ids if type(i) is not int or not 0 <= i < size]:
            raise UserError(
                f"{folder}/generation_config.json: eos_token_id = {bad[0]!r}: must be one of the tokenizer's {size} "
                "ids. Correct or remove it."
            )
        return cls(size=size, pad_id=eos_ids[0], eos_ids=eos_ids)

    def require_rows(self, **models: int) -> None:
        """Raise UserError unless each model has an embedding row for every id; else padding would be trained as text.

        Args:
            models: rows of each model's embedding in its checkpoint, by the model's name.
        """
        for which, rows in models.items():
            if rows < self.size:
                raise UserError(
                    f"{which}.path: the tokenizer has {self.size} ids, but the model {rows} rows. "
                    "Give the tokenizer it was trained with, or resize the model (resize_token_embeddings)."
                )

    def ends(self, token_ids: list[int]) -> bool:
        """Whether a response ends with an EOS, not at a length limit."""
        return bool(token_ids) and token_ids[-1] in self.eos_ids

    def first_response(self, token_ids: list[int]) -> list[int]:
        """The response up to and with its first EOS."""
        end = next((i for i, token in enumerate(token_ids) if token in self.eos_ids), len(token_ids))
        return token_ids[: end + 1]


def tokenizer_folder(path: str | Path) -> Path:
    """The folder inside a Hugging Face or NeMo checkpoint folder that holds the tokenizer's files."""
    inside = [Path(path, HF_ASSETS), Path(path, "context", "nemo_tokenizer")]  # of our import; of NeMo's
    return next((folder for folder in inside if folder.is_dir()), Path(path))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint folder. No code from the folder is run. UserError if there is none."""
    folder = tokenizer_folder(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a local Hugging Face or NeMo folder.")
    with transformers4_folder(folder) as translated:
        try:
            return AutoTokenizer.from_pretrained(translated, local_files_only=True, trust_remote_code=False)
        except Exception as e:  # transformers raises errors of many classes, tokenizers bare Exception
            reason = f"{' '.join(str(e).split()):.160}"  # transformers lists every model type it knows
            raise UserError(
                f"{folder}: has no tokenizer that transformers can load ({reason}). Copy the model's tokenizer into it."
            ) from e


def response_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """A response as text, without EOS and other special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True)


# Besides the vocabulary, both models must agree on these, and a resumed run with its start.
_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of vocabulary, special ids and chat template, not of the files' paths."""
    settings = {name: getattr(tokenizer, name) for name in _SETTINGS}
    return content_digest({"vocabulary": tokenizer.get_vocab(), "settings": settings})


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise UserError with the first difference in vocabulary, special ids or chat template.

    The divergence compares the two models token id by token id; one shifted id would make it meaningless.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    for token in sorted(student_vocab.keys() | teacher_vocab.keys()):
        _same(f"the id of token {token!r}", student_vocab.get(token), teacher_vocab.get(token))
    for name in _SETTINGS:
        _same(name, getattr(student, name), getattr(teacher, name))


def _same(what: str, student: Any, teacher: Any) -> None:
    if student != teacher:
        raise UserError(
            f"teacher.path: its tokenizer is not the student's: {what} is {teacher!r:.80} instead of {student!r:.80}. "
            "Choose a pair from one model family, or copy one tokenizer to both."
        )

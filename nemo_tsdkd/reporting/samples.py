"""samples.jsonl: prompts, responses and verdicts to read, with what the objective saw at each token of a response."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_tsdkd.checkpoints.atomic import write_atomically
from nemo_tsdkd.checkpoints.start_over import SAMPLES
from nemo_tsdkd.reporting.rows import first_step, read_samples

_DIGITS = 4  # significant, of each number


class SamplesWriter:
    """Appends samples to a run's samples.jsonl. On rank 0 only.

    Args:
        resume_step: the last step that the loaded checkpoint holds: samples of later steps are dropped; at 0 all.
    """

    def __init__(self, run_dir: Path, tokenizer: PreTrainedTokenizerBase, resume_step: int) -> None:
        self.path, self.tokenizer = run_dir / SAMPLES, tokenizer
        if self.path.exists():
            kept = [s for s in read_samples(self.path) if s["step"] < first_step(resume_step)]
            write_atomically(self.path, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in kept).encode())

    def write(self, sample: dict[str, Any]) -> None:
        """Write one sample: `prompt_ids` and `response_ids` become text, and `tokens` gets each token's own text."""
        ids = sample["response_ids"]
        columns = {name: [_rounded(value) for value in column] for name, column in sample["tokens"].items()}
        row = {
            "step": sample["step"],
            "kind": sample["kind"],
            "index": sample["index"],
            "prompt": self.tokenizer.decode(sample["prompt_ids"]),  # as the model reads it, chat template included
            "response": self.tokenizer.decode(ids, skip_special_tokens=True),
            "truncated": sample["truncated"],
            "on_policy": sample["on_policy"],
            "verdict": sample["verdict"],
            "tokens": {"text": token_texts(self.tokenizer, ids), **columns},
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None  # strict JSON has no infinity


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds: together the text of all. A token that ends within a character adds nothing; the
    one that completes the character adds it."""
    texts: list[str] = []
    first = read = 0  # tokens from `first` on are decoded again: a tokenizer may treat a text's start apart
    for i in range(len(ids)):
        before, now = tokenizer.decode(ids[first:read]), tokenizer.decode(ids[first : i + 1])
        whole = len(now) > len(before) and not now.endswith("\ufffd")
        texts.append(now[len(before) :] if whole or i == len(ids) - 1 else "")
        if whole:
            first, read = read, i + 1
    return texts

"""The sections on what a person sees of a run while it goes on: validation on held-out prompts, and samples to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nemo_tsdkd.config import validation
from nemo_tsdkd.config.schema import DataConfig


@dataclass
class HeldOutConfig(DataConfig):
    """The held-out prompts, as a data set to read; made by `ValidationConfig.data`."""

    split: str = "test"

    section: ClassVar[str] = "validation"


@dataclass
class ValidationConfig:
    """The student answers held-out prompts while it trains. It changes nothing of the training."""

    path: str | None = None  # of held-out prompts, in the formats of data.path; null: no validation
    subset: str | None = None  # of a hub data set
    split: str = "test"  # of a hub data set
    prompt_column: str = "prompt"
    answer_column: str = "answer"  # what the verifier compares with: text, a number or, for reasoning_gym, its entry
    limit: int | None = None  # read the first `limit` rows only
    every_n_steps: int = 50  # and after the last step
    at_start: bool = True  # before the first step too: the student's own score
    verifier: str = "exact"  # exact | math | reasoning_gym (verifiers/), or none: the divergence from the teacher alone
    max_new_tokens: int | None = None  # of a response; null: rollout.max_new_tokens
    temperature: float = 0.0  # 0: greedy; else the same noise at every validation
    patience: int = 0  # end the run after so many validations without a new best; 0: never

    def validate(self) -> None:
        validation.positive(self, "validation.", "every_n_steps")
        validation.not_negative(self, "validation.", "temperature", "patience")
        for name in ("limit", "max_new_tokens"):
            if getattr(self, name) is not None:
                validation.positive(self, "validation.", name)
        validation.require(
            self.path is not None or self.patience == 0,
            "validation.patience",
            self.patience,
            "needs validation.path",
            "Give held-out prompts, or leave it out.",
        )

    def data(self, training: DataConfig) -> HeldOutConfig:
        """The held-out prompts, in the shape of the `training` prompts."""
        assert self.path is not None
        return HeldOutConfig(
            path=self.path,
            subset=self.subset,
            split=self.split,
            prompt_column=self.prompt_column,
            seq_length=training.seq_length,
            apply_chat_template=training.apply_chat_template,
            limit=self.limit,
        )


@dataclass
class SamplesConfig:
    """Prompts with their responses, written to samples.jsonl with what the objective saw at each token."""

    every_n_steps: int = 50  # of training; 0: at validations only
    count: int = 4  # prompts of such a step, and of each validation; 0: none

    def validate(self) -> None:
        validation.not_negative(self, "samples.", "every_n_steps", "count")

"""reasoning-gym's own verifiers: each of its tasks has one."""

from __future__ import annotations

import json
from typing import Any

from nemo_tsdkd.verifiers.answers import final_answer
from nemo_tsdkd.verifiers.verdict import Verdict, verifier


@verifier("reasoning_gym", package="reasoning_gym", extra="verify")
class ReasoningGym:
    """The row's answer is reasoning-gym's entry: an object, or the JSON text of one, with `answer` and
    `metadata.source_dataset`. Right is what its task scores with 1."""

    def reference(self, value: Any) -> dict[str, Any]:
        try:
            entry = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or "answer" not in entry or not _task(entry):
            raise ValueError("must be reasoning-gym's entry, with answer and metadata.source_dataset")
        return entry

    def judge(self, response: str, reference: dict[str, Any]) -> Verdict:
        from reasoning_gym.factory import get_score_answer_fn

        answer, expected = final_answer(response), str(reference["answer"])
        if answer is None:
            return Verdict(False, None, expected)
        return Verdict(get_score_answer_fn(_task(reference))(answer, reference) == 1.0, answer, expected)


def _task(entry: dict[str, Any]) -> str | None:
    metadata = entry.get("metadata")
    task = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    return task if isinstance(task, str) and task else None

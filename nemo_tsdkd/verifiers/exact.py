"""The answer must be the expected text."""

from __future__ import annotations

from typing import Any

from nemo_tsdkd.verifiers.answers import final_answer
from nemo_tsdkd.verifiers.verdict import Verdict, text_reference, verifier


@verifier("exact")
class Exact:
    """Compares texts, blanks aside. A reference with a mark of its own (`... #### 42`) stands for what follows it."""

    def reference(self, value: Any) -> str:
        text = text_reference(value)
        return _one_line(final_answer(text) or text)

    def judge(self, response: str, reference: str) -> Verdict:
        answer = final_answer(response)
        return Verdict(answer is not None and _one_line(answer) == reference, answer, reference)


def _one_line(text: str) -> str:
    return " ".join(text.split())

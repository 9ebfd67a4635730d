r"""The answer must equal the expected one as mathematics: 1/2, 0.5 and \frac{1}{2} are one answer."""

from __future__ import annotations

from typing import Any

from nemo_tsdkd.verifiers.answers import final_answer
from nemo_tsdkd.verifiers.verdict import Verdict, text_reference, verifier


@verifier("math", package="math_verify", extra="verify")
class Math:
    """The package math-verify: it finds the answer (LaTeX, or the last expression) and compares.

    Its own time limits are off: they interrupt Python code only, and `judge.py` has one for everything.
    """

    def reference(self, value: Any) -> str:
        text = text_reference(value)
        return final_answer(text) or text

    def judge(self, response: str, reference: str) -> Verdict:
        from math_verify import parse, verify

        found = parse(response, parsing_timeout=None)
        expected = parse(reference, parsing_timeout=None) or parse(f"${reference}$", parsing_timeout=None)
        if not expected:
            raise ValueError(f"math-verify reads no mathematics in the expected answer {reference!r:.80}")
        answer = str(found[-1]) if found else None
        return Verdict(bool(found) and verify(expected, found, timeout_seconds=None), answer, reference)

"""Find the final answer in a response."""

from __future__ import annotations

import re

_MARK = re.compile(r"<answer>|\\boxed\{|####|[Aa]nswer:")


def final_answer(text: str) -> str | None:
    r"""What follows the last mark of an answer: `<answer>...</answer>`, `\boxed{...}`, `#### ...` or `Answer: ...`.

    The last two reach to the end of the text. None where there is no mark, or nothing behind it.
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    mark = marks[-1]
    rest = text[mark.end() :]
    if mark[0] == "<answer>":
        rest = rest.partition("</answer>")[0]
    elif mark[0].startswith("\\"):
        rest = _braced(rest)
    return rest.strip() or None


def _braced(text: str) -> str:
    """The text up to the brace that closes the one before it; nothing where it is not closed."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return ""

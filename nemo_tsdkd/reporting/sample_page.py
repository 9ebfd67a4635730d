"""Which samples report.html shows, and how they are packed. No torch on import."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from nemo_tsdkd.reporting.run_files import RunFiles

# What a token may be coloured by: column -> (what the page calls it, its unit).
COLUMNS = {
    "student_entropy": ("student's entropy", "nats"),
    "teacher_entropy": ("teacher's entropy", "nats"),
    "divergence": ("divergence", "nats"),
    "gate": ("gate", "weight"),
    "opener": ("in the opener", "weight"),
    "uncertain": ("chosen for the entropy term", "weight"),
}


def shown_samples(runs: Sequence[RunFiles], budget: int) -> dict[str, Any]:
    """The samples of all runs that fit into `budget` characters of JSON; what one run leaves is for the others.

    Whole steps go in, the last first, then the first, then the others from the last on: what the student writes now,
    and what it wrote before.

    Returns:
        `samples` by run and step; `columns`: each one's title, unit and the value of its strongest colour; `found`: how
        many samples there were.
    """
    columns = {
        name: {"title": title, "unit": unit, "full": _full(runs, name)} for name, (title, unit) in COLUMNS.items()
    }
    packed = [[_packed(sample, number) for sample in run.samples] for number, run in enumerate(runs)]
    sizes = [_sizes(samples) for samples in packed]
    chosen: dict[int, set[int]] = {}
    by_need = sorted(range(len(runs)), key=lambda number: sum(sizes[number].values()))
    for left, number in zip(range(len(runs), 0, -1), by_need, strict=True):
        chosen[number] = _steps_within(sizes[number], budget // left)
        budget -= sum(sizes[number][step] for step in chosen[number])
    samples = [sample for number, own in enumerate(packed) for sample in own if sample["step"] in chosen[number]]
    return {"columns": columns, "samples": samples, "found": sum(map(len, packed))}


def _sizes(samples: list[dict[str, Any]]) -> dict[int, int]:
    """Characters of each step's samples; `<`, `>` and `&` take six each once they are embedded."""
    sizes: dict[int, int] = {}
    for sample in samples:
        text = json.dumps(sample, separators=(",", ":"))
        sizes[sample["step"]] = sizes.get(sample["step"], 0) + len(text) + 1 + 5 * sum(map(text.count, "<>&"))
    return sizes


def _steps_within(sizes: dict[int, int], budget: int) -> set[int]:
    steps = sorted(sizes, reverse=True)
    chosen = set()
    for step in steps[:1] + steps[:0:-1][:1] + steps[1:-1]:
        budget -= sizes[step]
        if budget < 0:
            break
        chosen.add(step)
    return chosen


def _packed(sample: dict[str, Any], run: int) -> dict[str, Any]:
    """A sample's fields that the page shows, numbers with three digits, without columns that do not fit its tokens."""
    tokens = sample["tokens"]
    text = [str(piece) for piece in tokens["text"]] if isinstance(tokens.get("text"), list) else []
    verdict = sample.get("verdict") if isinstance(sample.get("verdict"), dict) else None
    return {
        "run": run,
        "step": sample["step"],
        "kind": str(sample.get("kind", "")),
        "index": sample.get("index") if type(sample.get("index")) is int else None,
        "prompt": str(sample.get("prompt", "")),
        "response": "" if text else str(sample.get("response", "")),  # the tokens have it
        "truncated": sample.get("truncated") is True,
        "on_policy": sample.get("on_policy", True) is not False,
        "verdict": verdict and {key: _said(verdict.get(key)) for key in ("correct", "answer", "expected", "error")},
        "text": text,
        "columns": {
            name: [_digits(value) for value in tokens[name]]
            for name in COLUMNS
            if isinstance(tokens.get(name), list) and len(tokens[name]) == len(text)
        },
    }


def _said(value: Any) -> Any:
    return value if value is None or isinstance(value, bool) else str(value)


def _digits(value: Any) -> float | None:
    """None where the file has no finite number: the page calls it infinite."""
    if isinstance(value, bool):
        return int(value)
    return float(f"{value:.3g}") if isinstance(value, int | float) and math.isfinite(value) else None


def _full(runs: Sequence[RunFiles], column: str) -> float:
    """The value that gets the strongest colour, the same in all samples: what all but one in a hundred tokens stay
    below, or 1 for weights."""
    if COLUMNS[column][1] == "weight":
        return 1.0
    values = sorted(
        value
        for run in runs
        for sample in run.samples
        if isinstance(sample["tokens"].get(column), list)
        for value in map(_digits, sample["tokens"][column])
        if value is not None
    )
    return max(values[int(0.99 * (len(values) - 1))], 1e-3) if values else 1.0

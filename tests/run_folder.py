"""A run folder as a run of some steps leaves it, without the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

# What a browser would run if a run's text reached the page as HTML, and what would end the element that holds it.
HOSTILE = "</script><script>window.injected = 1</script><img src=x onerror='window.injected = 2'> & <b>bold</b> \u2028"
SEEN = ("student_entropy", "teacher_entropy", "gate", "divergence")


def row(step: int, **more: float) -> dict[str, float]:
    """A step's metrics; every key has values of its own, so that a curve drawn from another key shows."""
    keys = (
        "loss direct indirect entropy direct_weighted indirect_weighted entropy_weighted "
        "student_entropy teacher_entropy gate_mean opener_fraction rank_agreement response_tokens "
        "response_length_mean response_length_p95 truncated_fraction rollout_s teacher_s student_s save_s "
        "grad_norm lr tokens_per_s memory_gib"
    ).split()
    return {"step": step, **{key: round((n + 1) + 1 / step, 6) for n, key in enumerate(keys)}, **more}


def validation(accuracy: float) -> dict[str, float]:
    return {
        "validation_accuracy": accuracy,
        "validation_accuracy_low": accuracy - 0.05,
        "validation_accuracy_high": accuracy + 0.05,
        "validation_s": 3.0,
        "validation_length_mean": 40.0,
    }


def sample(step: int, index: int, text: list[str], prompt: str = "What is 2 + 2?", correct: bool = False) -> dict:
    n = len(text)
    return {
        "step": step,
        "kind": "validation",
        "index": index,
        "prompt": prompt,
        "response": "".join(text),
        "truncated": False,
        "on_policy": True,
        "verdict": {"correct": correct, "answer": "4" if correct else None, "expected": "4", "error": None},
        "tokens": {
            "text": text,
            **{name: [round(0.1 * (i + k), 4) for i in range(n)] for k, name in enumerate(SEEN)},
            "opener": [i < 2 for i in range(n)],
            "uncertain": [i == 1 for i in range(n)],
        },
    }


def write_run(
    folder: Path, rows: list[dict], samples: Sequence[dict] = (), restarts: Sequence[int] = (), lr: float = 1e-5
) -> Path:
    """Write the files from which a report is made; the run was resumed after each step of `restarts`."""
    folder.mkdir(parents=True)
    for name, lines in (
        ("metrics.jsonl", rows),
        ("samples.jsonl", samples),
        ("starts.jsonl", [{"resume_step": step} for step in (0, *restarts)]),
    ):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"run_dir: r\noptim:\n  lr: {lr}\ndata:\n  path: {json.dumps(HOSTILE)}\n")
    (folder / "versions.json").write_text(json.dumps({"torch": "2.x", "git": {"revision": HOSTILE, "dirty": False}}))
    return folder

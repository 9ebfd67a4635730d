"""The study's plots, as small SVG files that are the same bytes for the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "study", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]})
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.study.claims import SELECTIONS  # noqa: E402

Row = dict[str, Any]
# Of the curves: who stands with whom. What is in none of them comes last, so that no arm is left out.
PANELS = {
    "Baselines and TSD-KD": ("sft", "off_policy_kd", "gkd", "reverse_kl", "tsdkd"),
    "TSD-KD and its parts": (
        *("tsdkd", "reference", "no_indirect", "no_gate", "no_entropy", "direct_only"),
        "random_opener",
    ),
    "Selections under reverse KL": ("reverse_kl", *SELECTIONS),
    "TSD-KD, by the teacher's precision": ("precision_bf16", "precision_fp8_tensorwise", "precision_fp8_blockwise"),
}
# Against what the accuracy is drawn: field of a summary -> label.
BESIDE = {
    "response_length": "tokens of a greedy response",
    "student_entropy": "student entropy, nats per token",
    "distinct": "distinct texts, % of the samples",
}


PLOTS = {
    "accuracy.svg": "Accuracy on the test split with its interval, each arm",
    "curves_steps.svg": "Accuracy on the validation split against steps, mean over seeds",
    "curves_tokens.svg": "Accuracy on the validation split against response tokens, mean over seeds",
    "beside.svg": "Response length, student entropy and diversity of each arm, the most accurate on top",
}


def draw_all(summaries: Sequence[Row], folder: Path) -> None:
    """Write PLOTS of these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy.svg": accuracies(summaries),
        "curves_steps.svg": curves(summaries, "step", "step"),
        "curves_tokens.svg": curves(summaries, "response_tokens", "response tokens"),
        "beside.svg": beside(summaries),
    }
    for name in PLOTS:
        figures[name].savefig(folder / name, metadata={"Date": None})
        pyplot.close(figures[name])


def accuracies(summaries: Sequence[Row]) -> Figure:
    """A dot and an interval for each arm, the best on top."""
    rows = sorted(summaries, key=lambda row: row["accuracy"])
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.27 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        colour = _colour(row["arm"])
        axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=colour)
        axes.plot(100 * row["accuracy"], place, "o", color=colour)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.set_xlabel("accuracy on the test split, %")
    axes.grid(axis="x", alpha=0.3)
    return figure


def curves(summaries: Sequence[Row], field: str, label: str) -> Figure:
    """The mean curves against a field of their points, a panel for each group of arms."""
    drawn = {row["arm"]: row for row in summaries if "curve" in row}
    others = tuple(arm for arm in drawn if not any(arm in arms for arms in PANELS.values()))
    panels = {title: [arm for arm in arms if arm in drawn] for title, arms in (PANELS | {"Others": others}).items()}
    panels = {title: arms for title, arms in panels.items() if arms}
    figure, all_axes = pyplot.subplots(
        1, max(len(panels), 1), figsize=(4 * max(len(panels), 1), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, arms) in zip(all_axes[0], panels.items(), strict=False):
        for arm in arms:
            curve = drawn[arm]["curve"]
            x, y = [point[field] for point in curve], [100 * point["accuracy"] for point in curve]
            axes.plot(x, y, label=arm)
        _finish(axes, title, label)
    all_axes[0][0].set_ylabel("accuracy, %")
    return figure


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def beside(summaries: Sequence[Row]) -> Figure:
    """Each of BESIDE by arm, the most accurate arm on top."""
    rows = sorted(summaries, key=lambda row: row["accuracy"])
    figure, all_axes = pyplot.subplots(
        1, len(BESIDE), figsize=(4 * len(BESIDE), 1 + 0.27 * len(rows)), sharey=True, layout="constrained"
    )
    for axes, (field, label) in zip(all_axes, BESIDE.items(), strict=True):
        for place, row in enumerate(rows):
            if row[field] is not None:
                value = row[field] * (100 if field == "distinct" else 1)
                axes.plot(value, place, "o", color=_colour(row["arm"]))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].set_yticks(range(len(rows)), [row["arm"] for row in rows])
    return figure


def _colour(arm: str) -> str:
    """Of the group that an arm belongs to."""
    if arm in ("student", "teacher"):
        return "black"
    groups = zip(("tab:blue", "tab:orange", "tab:green", "tab:purple"), PANELS.values(), strict=True)
    return next((colour for colour, arms in groups if arm in arms), "tab:grey")

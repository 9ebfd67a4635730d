"""The charts of report.html: which metrics each draws, and how plotly shows them. No torch on import."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from nemo_tsdkd.reporting.accuracy import ACCURACY, DIVERGENCE
from nemo_tsdkd.reporting.run_files import RunFiles

POINTS = 2_000  # of a curve and a run; of longer runs each point is the mean of as many steps as it takes
BARS = 120
# Okabe and Ito's colours, which colour-blind readers can tell apart; the runs', or the metrics' of a single run.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a00")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
PHASES = ("rollout_s", "teacher_s", "student_s", "save_s", "validation_s")


class Chart(NamedTuple):
    """A chart of metrics over steps."""

    name: str
    title: str
    unit: str
    metrics: tuple[str, ...]


CHARTS = (
    Chart("accuracy", "Held-out accuracy with its 95 % interval", "share of right answers", (ACCURACY,)),
    Chart("held_out", "Held-out divergence", "nats a response token", (DIVERGENCE,)),
    Chart(
        "loss",
        "Loss, and its terms as they enter it",
        "nats",
        ("loss", "direct_weighted", "indirect_weighted", "entropy_weighted"),
    ),
    Chart("terms", "The terms before their weights", "nats", ("direct", "indirect", "entropy")),
    Chart("entropy", "Entropy", "nats a response token", ("student_entropy", "teacher_entropy")),
    Chart("selection", "Selection", "share of tokens, mean weight", ("gate_mean", "opener_fraction")),
    Chart("rank_agreement", "Candidate pairs that both models order alike", "share", ("rank_agreement",)),
    Chart(
        "length",
        "Response length",
        "tokens",
        ("response_length_mean", "response_length_p95", "validation_length_mean"),
    ),
    Chart(
        "truncated",
        "Responses cut by the length limit, or without an answer",
        "share of responses",
        ("truncated_fraction", "validation_truncated_fraction", "validation_unanswered_fraction"),
    ),
    Chart("speed", "Speed", "response tokens a second", ("tokens_per_s",)),
    Chart("lr", "Learning rate", "", ("lr",)),
    Chart("grad_norm", "Norm of the gradient", "", ("grad_norm",)),
    Chart("memory", "Memory of the fullest rank, its peak in the step", "GiB", ("memory_gib",)),
)
# What no chart of its own is made of: no curves, or drawn with others.
_NOT_DRAWN = {"step", "timestamp", "epoch", f"{ACCURACY}_low", f"{ACCURACY}_high", *PHASES}


def figures(runs: Sequence[RunFiles]) -> list[tuple[str, str, go.Figure]]:
    """(name, title, figure) of every chart that a run has rows for: `CHARTS`, the time by phase of each run, then a
    chart of each further metric."""
    recorded = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    drawn = _NOT_DRAWN.union(*(chart.metrics for chart in CHARTS))
    weighted = tuple(key for key in recorded if key.endswith("_weighted") and key not in drawn)
    charts = [chart._replace(metrics=chart.metrics + weighted) if chart.name == "loss" else chart for chart in CHARTS]
    further = [Chart(key, key, "", (key,)) for key in recorded if key not in drawn.union(weighted)]
    found = [
        (chart.name, chart.title, _lines(chart, runs))
        for chart in charts
        if not recorded.keys().isdisjoint(chart.metrics)
    ]
    for number, run in enumerate(runs):
        if run.rows:
            title = "Time by phase" + (f": {run.name}" if len(runs) > 1 else "")
            found.append((f"time_{number}", title, _bars(run, max(_per_bar(other) for other in runs))))
    return found + [(f"further_{chart.name}", chart.title, _lines(chart, runs)) for chart in further]


def series(run: RunFiles, metric: str) -> tuple[list[int], list[float]]:
    """The steps at which a run recorded a metric, and its values there."""
    rows = [row for row in run.rows if metric in row]
    return [int(row["step"]) for row in rows], [row[metric] for row in rows]


def thinned(steps: Sequence[int], values: Sequence[float], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points: each is the mean of some steps in a row and stands at the last of them."""
    size = max(1, math.ceil(len(steps) / limit))
    ends = [min(start + size, len(steps)) for start in range(0, len(steps), size)]
    means = [np.mean(values[i * size : end]) for i, end in enumerate(ends)]
    # As arrays of 4 bytes, which plotly embeds in base64: half the size of their digits.
    return np.array([steps[end - 1] for end in ends], np.int32), np.array(means, np.float32)


def _lines(chart: Chart, runs: Sequence[RunFiles]) -> go.Figure:
    figure = _figure(chart.unit)
    one, lone_metric = len(runs) == 1, len(chart.metrics) == 1
    for number, run in enumerate(runs):
        for place, metric in enumerate(chart.metrics):
            steps, values = series(run, metric)
            if not steps:
                continue
            colour = COLOURS[(place if one else number) % len(COLOURS)]
            name = metric if one else run.name if lone_metric else f"{run.name}: {metric}"
            if metric == ACCURACY:
                _interval(figure, run, colour)
            x, y = thinned(steps, values, POINTS)
            dash = "solid" if one else DASHES[place % len(DASHES)]
            few = len(x) <= 40  # points that a reader can tell apart; one alone would be no line at all
            figure.add_scatter(
                x=x,
                y=y,
                name=plain(name),
                mode="lines+markers" if few else "lines",
                line={"color": colour, "dash": dash, "width": 1.6},
            )
        _mark_restarts(figure, run, "#888888" if one else COLOURS[number % len(COLOURS)])
    figure.update_layout(showlegend=not (one and lone_metric))
    return figure


def _interval(figure: go.Figure, run: RunFiles, colour: str) -> None:
    (steps, low), (_, high) = series(run, f"{ACCURACY}_low"), series(run, f"{ACCURACY}_high")
    if steps and len(low) == len(high):
        band = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(x=steps, y=low, name="interval", **band)
        figure.add_scatter(x=steps, y=high, name="interval", fill="tonexty", fillcolor=f"{colour}33", **band)


def _per_bar(run: RunFiles) -> int:
    return max(1, math.ceil(len(run.rows) / BARS))


def _bars(run: RunFiles, steps_per_bar: int) -> go.Figure:
    unit = "seconds" if steps_per_bar == 1 else f"seconds a step, mean of {steps_per_bar} steps"
    figure = _figure(unit)
    steps = [int(row["step"]) for row in run.rows]
    for place, phase in enumerate(PHASES):
        values = [row.get(phase, 0.0) for row in run.rows]  # a step without a save or a validation took no time for it
        if any(values):
            x, y = thinned(steps, values, math.ceil(len(steps) / steps_per_bar))
            figure.add_bar(x=x, y=y, name=phase, marker={"color": COLOURS[place], "line": {"width": 0}})
    figure.update_layout(barmode="stack", bargap=0.05, showlegend=True)
    _mark_restarts(figure, run, "#888888")
    return figure


def _mark_restarts(figure: go.Figure, run: RunFiles, colour: str) -> None:
    for step in run.restarts:
        line = {"color": colour, "dash": "dash", "width": 1}
        figure.add_shape(type="line", x0=step + 0.5, x1=step + 0.5, y0=0, y1=1, yref="paper", line=line, name="restart")


def _figure(unit: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=320,
        margin={"l": 64, "r": 16, "t": 24, "b": 40},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        hovermode="x unified",
        xaxis={"title": {"text": "step", "standoff": 4}},
        yaxis={"title": {"text": unit}},
    )
    return figure


def plain(text: str) -> str:
    """A name that plotly shows as it is: it takes a few tags and entities of HTML for markup."""
    return escape(text, quote=False)

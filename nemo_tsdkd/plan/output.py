"""Plans and sweeps for a reader: tables in the terminal, a picture of the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_tsdkd.checks.memory import GIB, RESERVE
from nemo_tsdkd.plan.plan import Plan
from nemo_tsdkd.plan.sweep import Candidate

SHOWN = 20  # layouts of a sweep in the terminal


def print_plan(plan: Plan, console: Console) -> None:
    """Memory by stage and act, collectives, and time by act."""
    for table in (_memory(plan), _collectives(plan), _time(plan)):
        console.print(table)
    console.print(f"The step's largest part: {plan.bottleneck}.")
    if plan.has_experts:
        console.print("The teacher's experts are taken to get equal shares of the tokens; teacher_expert_load tells.")
    verdict = "fits" if plan.fits else "does NOT fit"
    console.print(
        f"The fullest GPU needs {plan.needs / GIB:.1f} GiB, {RESERVE / GIB:.0f} of them for CUDA, NCCL and "
        f"fragmentation: the job {verdict} into {plan.hardware.memory_gib:.1f} GiB."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of a GPU in GiB", "stage", "act", "held", "peak", "arithmetic", "difference")
    for stage in plan.stages:
        for act in stage.step.peak:
            peak, expected = stage.peak_of(act), stage.arithmetic.get(act)
            beside = ("", "") if expected is None else (_gib(expected), f"{peak / expected - 1:+.1%}")
            marked = f"{act} (most)" if act == stage.fullest else act
            table.add_row(stage.step.role.name, marked, _gib(stage.held(act)), _gib(peak), *beside)
    return table


def _collectives(plan: Plan) -> Table:
    table = _table("Collectives of a step", "stage", "act", "group", "operator", "calls", "GiB", "seconds")
    for stage in plan.stages:
        seconds = dict(stage.step.collective_s)
        for one in stage.step.collectives:
            spent = seconds.pop((one.act, one.group), None)  # of all its operators, in the group's first row
            size, time = f"{one.size / GIB:.3f}", "" if spent is None else f"{spent:.3f}"
            table.add_row(stage.step.role.name, one.act, one.group, one.operator, f"{one.calls:.0f}", size, time)
    return table


def _time(plan: Plan) -> Table:
    table = _table("A step's time, an estimate (conf/hardware)", "act", "stage", "TFLOP a GPU", "computes", "act lasts")
    for act, seconds in plan.seconds.items():
        for number, stage in enumerate(plan.stages):
            step = stage.step
            lasts = "" if number else f"{seconds:.2f} s"
            table.add_row(act, step.role.name, f"{step.flops[act] / 1e12:.1f}", f"{step.compute_s[act]:.2f} s", lasts)
    table.add_row("step", "", "", "", f"{plan.step_s:.2f} s")
    return table


def print_sweep(candidates: Sequence[Candidate], console: Console) -> None:
    """Layouts that fit, the dry-run ones first, and how many do not for which reason."""
    table = _table("Layouts that fit", "layout", "GiB", "rough s", "plan GiB", "plan s")
    for candidate in [c for c in candidates if c.reason is None][:SHOWN]:
        beside = ("", "")
        if plan := candidate.plan:
            beside = _gib(plan.needs), f"{plan.step_s:.2f}"
        table.add_row(candidate.name, f"{candidate.memory_gib:.1f}", f"{candidate.seconds:.2f}", *beside)
    console.print(table)
    feasible = sum(candidate.reason is None for candidate in candidates)
    if feasible > SHOWN:
        console.print(f"... and {feasible - SHOWN} more that fit; --json writes all.")
    reasons = Counter(_kind_of(candidate.reason) for candidate in candidates if candidate.reason)
    for reason, count in reasons.most_common():
        console.print(f"{count} layouts do not: {reason}")
    if feasible:
        console.print(f"The first one: {candidates[0].overrides}")


def _kind_of(reason: str) -> str:
    """A reason without its numbers' detail: too little memory is one reason for all layouts."""
    return "too little memory" if reason.startswith("needs ") else reason


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """One row of a sweep, its seconds rough ones, with the dry run's figures where there are any."""
    row = {
        "layout": candidate.name,
        "overrides": candidate.overrides,
        "arithmetic_gib": candidate.memory_gib,
        "rough_s": candidate.seconds,
        "reason": candidate.reason,
    }
    return row | ({"plan": candidate.plan.as_json()} if candidate.plan else {})


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def draw_memory(plan: Plan, path: Path) -> None:
    """Write a PNG: a bar for each stage and act, its parts the terms of the memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = list(_bars(plan))
    labels = sorted({label for _, parts in bars for label in parts})
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.4 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    for number, label in enumerate(labels):
        widths = [parts.get(label, 0.0) / GIB for _, parts in bars]
        axes.barh([name for name, _ in bars], widths, left=left, label=label, color=colours(number % 20))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(plan.hardware.memory_gib, color="black", linestyle="--", label="the GPU's memory")
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(plan: Plan) -> Iterator[tuple[str, dict[str, float]]]:
    for stage in plan.stages:
        for act, parts in stage.step.at_peak.items():
            more = {"reserve": RESERVE, "FP8 copies (arithmetic)": stage.fp8_copies}
            yield f"{stage.step.role.name}: {act}", {k: v for k, v in (parts | more).items() if v > 0.001 * GIB}

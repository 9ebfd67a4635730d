"""How the study's page writes values, lists, tables and plots in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.plots import PLOTS

Row = dict[str, Any]


def image(plot: str) -> str:
    return f"![{PLOTS[plot]}](study/{plot})"


def values(rows: Sequence[Row], field: str) -> list[str]:
    return sorted({str(row[field]) for row in rows if field in row})


def states(rows: Sequence[Row]) -> list[str]:
    found = [row["git"] for row in rows if "git" in row]
    return sorted({f"{git['revision']}{' and local changes' if git['dirty'] is True else ''}" for git in found})


def versions(rows: Sequence[Row]) -> list[str]:
    return sorted({f"{name} {number}" for row in rows for name, number in row.get("versions", {}).items()})


def code(values: Iterable[str]) -> str:
    return listed(f"`{value}`" for value in values)


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def span(low: float, high: float) -> str:
    return f"({percent(low)} to {percent(high)})"


def with_interval(row: Row) -> str:
    return f"{percent(row['accuracy'])} {span(row['low'], row['high'])}"


def difference(row: Row) -> str:
    low, high = (f"{100 * row[side]:+.1f}" for side in ("low", "high"))
    return f"{100 * row['difference']:+.1f} ({low} to {high})"

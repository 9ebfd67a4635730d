"""The study's statistics: means, 95 % intervals and paired differences, as rows that stand beside the results.

Intervals are percentiles of a bootstrap over seeds and over test problems, both drawn anew in each resample. Problems
are drawn within their family, since each family has a fixed number of them. All arms see the same draws and solve the
same problems with the same seeds, so the resamples of a difference are paired. The page prints these rows and computes
nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from benchmarks.study.claims import AGAINST, PRECISE, Question, is_precision, paper_questions, rule_questions

Row = dict[str, Any]
RESAMPLES = 10_000
LEVEL = 0.95
SEED = 20_260_313
DIGITS = 6  # of what is kept: more than a sum's order of addition can change
HOLDS, HOLDS_NOT, UNCLEAR, NOT_RUN = "holds", "does not hold", "cannot be told", "not run"
MEASURES = (
    "sampled_accuracy",
    "response_tokens",
    "response_length",
    "truncated",
    "student_entropy",
    "distinct",
    "forward_kl",
    "reverse_kl",
    "seconds",
)


class Runs(NamedTuple):
    """An arm's rows of the test split by seed (None: a model before distillation)."""

    arm: str
    rows: dict[int | None, Row]

    @property
    def correct(self) -> dict[int | None, np.ndarray]:
        """[problems], 1 where the greedy answer is right, by seed."""
        return {seed: np.array([*map(int, row["correct"])], float) for seed, row in self.rows.items()}


def summaries(results: Sequence[Row]) -> list[Row]:
    """The aggregated rows: one "study" row, then a "summary" of each arm, then each "comparison" of two arms.

    Raises ValueError where the test rows do not answer the same problems.
    """
    runs = runs_by_arm(results)
    families = families_of(runs)
    trained = {arm: of for arm, of in runs.items() if None not in of.rows}
    tokens = equal_tokens(trained)
    arms = [summary(of, results, families, tokens) for of in runs.values()]
    compared = comparisons(runs, families, tokens)
    pairs = {(frozenset((row["arm"], row["against"])), row["family"], row["at"]) for row in compared}
    about = {
        "arm": "all",
        "seed": None,
        "split": "study",
        "accuracy": None,
        "steps": max((row["steps"] for row in arms), default=0),
        "response_tokens": tokens,
        "arms": len(trained),
        "seeds": sorted({seed for of in trained.values() for seed in of.rows if seed is not None}),
        "families": {family: count_of(runs) // len(families) for family in families},
        "problems": count_of(runs),
        "seconds": round(sum(row.get("seconds", 0) for row in results if row["split"] in ("test", "validation"))),
        "level": LEVEL,
        "resamples": RESAMPLES,
        "bootstrap_seed": SEED,
        "paper": tally(paper_questions(families), compared),
        "comparisons": len(pairs),
        "expected_by_chance": round(len(pairs) * (1 - LEVEL), 1),
    }
    return [about, *arms, *compared]


def runs_by_arm(results: Sequence[Row]) -> dict[str, Runs]:
    runs: dict[str, Runs] = {}
    for row in results:
        if row["split"] == "test":
            kept = runs.setdefault(row["arm"], Runs(row["arm"], {})).rows
            if row["seed"] in kept:
                raise ValueError(f"two test rows of arm {row['arm']}, seed {row['seed']}")
            kept[row["seed"]] = row
    return runs


def families_of(runs: dict[str, Runs]) -> list[str]:
    """The families in the order in which they take turns: problem i is of family i modulo their number."""
    rows = [row for of in runs.values() for row in of.rows.values()]
    families = list(rows[0]["accuracy_by_family"])
    for row in rows:
        shares = [row["correct"][i :: len(families)].count("1") * len(families) for i in range(len(families))]
        expected = [row["accuracy_by_family"].get(family, -1) * len(row["correct"]) for family in families]
        if len(row["correct"]) != len(rows[0]["correct"]) or not np.allclose(shares, expected):
            raise ValueError(f"arm {row['arm']}, seed {row['seed']}: `correct` and `accuracy_by_family` disagree")
    return families


def count_of(runs: dict[str, Runs]) -> int:
    return len(next(iter(next(iter(runs.values())).rows.values()))["correct"])


@lru_cache(maxsize=8)
def seed_weights(seeds: int) -> np.ndarray:
    """[resamples, seeds], the share of each seed in each resample."""
    return np.random.default_rng(SEED).multinomial(seeds, [1 / seeds] * seeds, size=RESAMPLES) / seeds


@lru_cache(maxsize=2)
def problem_weights(problems: int, families: int) -> np.ndarray:
    """[resamples, problems], the share of each problem in each resample, its family's share being fixed."""
    rng = np.random.default_rng(SEED + 1)
    each = problems // families
    weights = np.empty((RESAMPLES, problems))
    for family in range(families):
        weights[:, family::families] = rng.multinomial(each, [1 / each] * each, size=RESAMPLES) / problems
    return weights


def interval(values: np.ndarray, families: int = 1, family: int | None = None) -> tuple[float, float]:
    """Of the mean of `values` [seeds, problems], or of one family's of them: seeds and problems are drawn anew."""
    weights = problem_weights(values.shape[1], families)
    if family is not None:
        values, weights = values[:, family::families], weights[:, family::families] * families
    resampled = np.einsum("rp,rp->r", seed_weights(len(values)) @ values, weights)
    return _percentiles(resampled)


def seed_interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of `values` [seeds]: seeds alone are drawn anew."""
    return _percentiles(seed_weights(len(values)) @ values)


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return _rounded(low), _rounded(high)


def equal_tokens(trained: dict[str, Runs]) -> int:
    """The smallest number of response tokens that a run of any arm ended with."""
    return min((row["curve"][-1]["response_tokens"] for of in trained.values() for row in of.rows.values()), default=0)


def at_tokens(row: Row, tokens: int) -> float:
    """The accuracy on the validation split after this many response tokens, between two points by a straight line."""
    curve = row["curve"]
    return float(np.interp(tokens, [p["response_tokens"] for p in curve], [p["accuracy"] for p in curve]))


def summary(of: Runs, results: Sequence[Row], families: Sequence[str], tokens: int) -> Row:
    """An arm's means over its seeds, with intervals of the accuracies, its learning rate and its mean curve."""
    rows, right = list(of.rows.values()), np.stack([*of.correct.values()])
    low, high = interval(right, len(families))
    row = {
        "arm": of.arm,
        "seed": None,
        "split": "summary",
        "accuracy": _rounded(right.mean()),
        "low": low,
        "high": high,
        "steps": max(row["steps"] for row in rows),
        "seeds": len(rows),
        **{name: _mean([row.get(name) for row in rows]) for name in MEASURES},
        "accuracy_by_family": {
            family: _rounded(right[:, i :: len(families)].mean()) for i, family in enumerate(families)
        },
    }
    row["interval_by_family"] = {family: interval(right, len(families), i) for i, family in enumerate(families)}
    if None in of.rows:
        return row
    found = np.array([at_tokens(row, tokens) for row in rows])
    low, high = seed_interval(found)
    row["at_equal_tokens"] = {"accuracy": _rounded(found.mean()), "low": low, "high": high}
    row["curve"] = _mean_curve([row["curve"] for row in rows])
    rates = sorted({row["lr"] for row in results if row["split"] == "validation" and row["arm"] == of.arm})
    row["lr"] = Counter(row["lr"] for row in rows).most_common(1)[0][0]
    row["grid_edge"] = {rates[0]: "lowest", rates[-1]: "highest"}.get(row["lr"]) if len(rates) > 1 else None
    return row


def _mean_curve(curves: Sequence[Sequence[Row]]) -> list[Row]:
    """Point by point over the seeds, as far as all of them go."""
    return [
        {
            "step": points[0]["step"],
            "response_tokens": round(np.mean([p["response_tokens"] for p in points])),
            "accuracy": _rounded(np.mean([p["accuracy"] for p in points])),
        }
        for points in zip(*curves, strict=False)
    ]


def comparisons(runs: dict[str, Runs], families: Sequence[str], tokens: int) -> list[Row]:
    """Every arm against AGAINST (those of a precision: against bf16), and every question that can be asked."""
    wanted: dict[tuple[str, str, str, str], None] = {}
    for arm in runs:
        for against in (PRECISE,) if is_precision(arm) else AGAINST:
            wanted[arm, against, "", "steps"] = None
    for question in [*paper_questions(families), *rule_questions()]:
        wanted[question.arm, question.against, question.family, question.at] = None
    found = []
    for arm, against, family, at in wanted:
        if arm != against and arm in runs and against in runs:
            row = compare(runs[arm], runs[against], families, family, tokens if at == "tokens" else None)
            found += [row] if row else []
    return found


def compare(
    ours: Runs, theirs: Runs, families: Sequence[str] = ("",), family: str = "", tokens: int | None = None
) -> Row | None:
    """The mean difference of two arms over the seeds that both have, with its paired interval; None: no such seed.

    Args:
        family: on the problems of this family alone.
        tokens: on the validation split after this many response tokens, with an interval over seeds alone.
    """
    pairs = _paired(ours, theirs)
    if not pairs:
        return None
    if tokens is None:
        place = families.index(family) if family else None
        part = slice(place, None, len(families)) if family else slice(None)
        a, b = (np.stack([of.correct[pair[i]] for pair in pairs]) for i, of in enumerate((ours, theirs)))
        low, high = interval(a - b, len(families), place)
        a, b = a[:, part].mean(1), b[:, part].mean(1)
    else:
        a, b = (
            np.array([at_tokens(of.rows[pair[i]], tokens) for pair in pairs]) for i, of in enumerate((ours, theirs))
        )
        low, high = seed_interval(a - b)
    used = [ours.rows[seed] for seed, _ in pairs]
    return {
        "arm": ours.arm,
        "against": theirs.arm,
        "family": family,
        "at": "steps" if tokens is None else "tokens",
        "seed": None,
        "split": "comparison",
        "seeds": len(pairs),
        "accuracy": _rounded(a.mean()),
        "accuracy_against": _rounded(b.mean()),
        "difference": _rounded(a.mean() - b.mean()),
        "low": low,
        "high": high,
        "seeds_better": int((a > b).sum()),
        "verdict": verdict(low, high),
        "steps": max(row["steps"] for row in used),
        "response_tokens": _mean([row["response_tokens"] for row in used]) if tokens is None else tokens,
    }


def _paired(ours: Runs, theirs: Runs) -> list[tuple[int | None, int | None]]:
    """Seeds of both; a model before distillation goes with every seed of the other."""
    if None in ours.rows or None in theirs.rows:
        return [(a, b) for a in ours.rows for b in theirs.rows]
    return [(seed, seed) for seed in ours.rows if seed in theirs.rows]


def tally(questions: Sequence[Question], compared: Sequence[Row]) -> dict[str, int]:
    """How many questions have each verdict."""
    by_question = {(row["arm"], row["against"], row["family"], row["at"]): row["verdict"] for row in compared}
    found = Counter(by_question.get(question[1:], NOT_RUN) for question in questions)
    return {name: found[name] for name in (HOLDS, HOLDS_NOT, UNCLEAR, NOT_RUN)}


def verdict(low: float, high: float) -> str:
    """What an interval of the difference says of "the first is better"."""
    if low > 0:
        return HOLDS
    return HOLDS_NOT if high < 0 else UNCLEAR


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a value is missing."""
    return None if any(value is None for value in values) else _rounded(np.mean(values))  # type: ignore[arg-type]


def _rounded(value: Any) -> float:
    return round(float(value), DIGITS)

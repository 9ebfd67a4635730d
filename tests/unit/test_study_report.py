"""The study's statistics against known cases, and its page against its rows; all rows are made up here."""

import json
import math
import re

import numpy as np
import pytest

from benchmarks.study import analysis
from benchmarks.study.analysis import interval, seed_interval, summaries
from benchmarks.study.arms import ARMS
from benchmarks.study.page import text_of, write_page
from benchmarks.study.plots import curves

FAMILIES = ("sums", "legs", "gcd")
EACH = 20  # problems of a family
RATES = (0.0003, 0.001, 0.003)
TITLES = {name: arm.title for name, arm in ARMS.items()}
NORMAL = 1.959964  # standard deviations to each side of a normal distribution's 95 %
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w.]*\w)")


def bits(flags):
    return "".join("01"[int(flag)] for flag in flags)


def scores(correct):
    shares = {family: sum(map(int, correct[i::3])) / EACH for i, family in enumerate(FAMILIES)}
    return {"accuracy": correct.count("1") / len(correct), "accuracy_by_family": shares, "correct": correct}


def measures(rng):
    names = (
        "response_length",
        "truncated",
        "sampled_accuracy",
        "distinct",
        "student_entropy",
        "forward_kl",
        "reverse_kl",
    )
    return {name: float(rng.random()) for name in names}


def test_row(arm, seed, correct, rng, last=4000):
    curve = [
        {"step": step, "response_tokens": last * step // 40, "accuracy": float(rng.random())} for step in (0, 20, 40)
    ]
    about = {
        "git": {"revision": "abc123", "dirty": False},
        "cpu": "A CPU 9",
        "threads": 1,
        "versions": {"torch": "2.9"},
    }
    digests = {"student": "5717", "teacher": "7ea", "trained": f"{arm}{seed}"}
    row = {"arm": arm, "seed": seed, "split": "test", "lr": 0.003 if arm == "tip" else 0.001, "steps": 40}
    row |= {"response_tokens": last, "seconds": 31.5, "curve": curve, "digests": digests}
    return row | scores(correct) | measures(rng) | about


test_row.__test__ = False


def study_rows(arms=tuple(ARMS), seeds=(1, 2, 3, 4, 5)):
    """Arms whose accuracy grows with their place; tsdkd is right wherever gkd is, and more often."""
    rng = np.random.default_rng(0)
    rows = []
    for arm in ("student", "teacher"):
        correct = bits(rng.random(3 * EACH) < 0.6)
        row = {"arm": arm, "seed": None, "split": "test", "steps": 0, "response_tokens": 0}
        rows.append(row | scores(correct) | measures(rng) | ({"forward_kl": None, "reverse_kl": None}))
    for place, arm in enumerate(arms):
        for seed in seeds:
            drawn = np.random.default_rng(seed).random(3 * EACH)  # the same of all arms
            bar = {"gkd": 0.2, "tsdkd": 0.7}.get(arm, 0.3 + 0.01 * place)
            rows.append(test_row(arm, seed, bits(drawn < bar), rng, 4000 - 100 * place - seed))
        if not ARMS[arm].precision:
            for rate in RATES:
                about = {"arm": arm, "seed": 0, "split": "validation", "lr": rate, "steps": 40, "response_tokens": 3900}
                rows.append(about | {"accuracy": float(rng.random()), "curve": []})
    decided = {name: float(rng.random()) for name in ("openers", "uncertain", "gate_q50", "gate_q90", "gate_q99")}
    decided |= {name: float(rng.random()) for name in ("rankings", "best", "pairs_turned")}
    about = {"arm": "teacher fp8_blockwise", "seed": None, "split": "decisions", "accuracy": None, "steps": 0}
    about |= {"response_tokens": 0, "model": "teacher", "precision": "fp8_blockwise", "first_last_layers_bf16": True}
    return [*rows, about | decided]


COMMAND = "python -m benchmarks.study"


def page_of(rows, titles=TITLES):
    return text_of([*rows, *summaries(rows)], titles, COMMAND)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(rows, the page, its folder) of a study without gaps."""
    folder, rows = tmp_path_factory.mktemp("docs"), study_rows()
    rows += summaries(rows)
    write_page(rows, folder, TITLES, COMMAND)
    return rows, (folder / "study.md").read_text(), folder


def test_an_interval_is_of_seeds_and_problems():
    """Of a_s + b_p the bootstrap's variance is var(a)/seeds + var(b)/problems, and families' levels add nothing."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 1)), 4 * rng.normal(size=300)
    inner = np.mean([b[i::3].var() for i in range(3)])
    expected = NORMAL * math.sqrt(a.var() / 40 + inner / 300)
    values = a + b + np.tile([0.0, 50.0, -20.0], 100)
    low, high = interval(values, families=3)
    assert low == pytest.approx(values.mean() - expected, abs=0.05 * expected)
    assert high == pytest.approx(values.mean() + expected, abs=0.05 * expected)
    width = NORMAL * math.sqrt(a.var() / 40 + b[1::3].var() / 100)
    low, high = interval(values, 3, family=1)
    assert (high - low) / 2 == pytest.approx(width, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values[:, 1::3].mean(), abs=0.05 * width)
    low, high = seed_interval(a[:, 0])
    assert (high - low) / 2 == pytest.approx(NORMAL * math.sqrt(a.var() / 40), rel=0.05)


def test_an_interval_is_that_of_a_slow_loop():
    """Few seeds and problems, where the distribution is far from normal."""
    rng = np.random.default_rng(2)
    values = (rng.random((3, 12)) < [0.9, 0.5, 0.1] * 4).astype(float)
    means = []
    for _ in range(4000):
        seeds = rng.integers(3, size=3)
        problems = [3 * rng.integers(4) + family for family in range(3) for _ in range(4)]
        means.append(sum(values[s, p] for s in seeds for p in problems) / 36)
    means.sort()
    assert interval(values, 3) == pytest.approx((means[100], means[3900]), abs=0.03)


def test_differences_are_paired():
    """Two arms with the same errors differ by nothing, whatever the order of their rows, though each varies."""
    rng = np.random.default_rng(3)
    correct = {seed: bits(rng.random(3 * EACH) < 0.2 * seed) for seed in (1, 2, 3)}
    rows = [test_row("gkd", seed, correct[seed], rng) for seed in (1, 2, 3)]
    rows += [test_row("tsdkd", seed, correct[seed], rng) for seed in (3, 1, 2)]
    rows.append(test_row("tsdkd", 4, "1" * 3 * EACH, rng))  # gkd has no such seed
    found = {(row["arm"], row.get("against")): row for row in summaries(rows)}
    row = found["tsdkd", "gkd"]
    assert (row["difference"], row["low"], row["high"], row["seeds"]) == (0, 0, 0, 3)
    assert row["verdict"] == "cannot be told" and row["seeds_better"] == 0
    assert found["gkd", None]["high"] - found["gkd", None]["low"] > 0.2


def test_verdicts_follow_the_intervals(whole):
    rows, page, _ = whole
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert lines["TSD-KD is better than GKD"].endswith("| 5 of 5 | holds |")
    compared = [row for row in rows if row["split"] == "comparison"]
    assert {row["verdict"] for row in compared} >= {"holds", "does not hold"}
    for row in compared:
        low, high = row["low"], row["high"]
        assert low <= row["difference"] <= high
        assert row["verdict"] == ("holds" if low > 0 else "does not hold" if high < 0 else "cannot be told")
    assert analysis.verdict(0.0, 0.1) == "cannot be told"


def test_accuracy_at_equal_tokens_is_interpolated():
    rng = np.random.default_rng(4)
    rows = [test_row("gkd", 1, "1" * 3 * EACH, rng, last=1000), test_row("tsdkd", 1, "0" * 3 * EACH, rng, last=4000)]
    for row, accuracies in zip(rows, ((0.1, 0.2, 0.5), (0.2, 0.6, 0.9)), strict=True):
        for point, accuracy in zip(row["curve"], accuracies, strict=True):
            point["accuracy"] = accuracy
    found = {row["arm"]: row for row in summaries(rows) if row["split"] == "summary"}
    assert found["gkd"]["at_equal_tokens"]["accuracy"] == 0.5
    assert found["tsdkd"]["at_equal_tokens"]["accuracy"] == pytest.approx(0.4)  # at 1000 of 0 ... 2000


def leaves(value):
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    elif isinstance(value, int | float):
        yield abs(value)


def written(rows):
    """How the page may write the numbers of these rows."""
    found = set()
    for value in leaves(rows):
        if isinstance(value, int):
            found.add(f"{value:,}")
        else:
            found |= {f"{100 * value:.1f}", *(f"{value:{how}}" for how in (".1f", ".3f", ".4f", "g"))}
            found |= {f"{value:,.0f}"} if value > 10 else set()
    return found


def made_up(page, rows):
    """Numbers of a page that are in no row: in a table's line, in none of the rows of the arms that it names."""
    text = page
    for title in sorted(TITLES.values(), key=len, reverse=True):
        text = text.replace(title, "")
    text = re.sub(r"\]\([^)]*\)", "", text).replace("temperature 1", "").replace("95 %", "")
    text = re.sub(r"\b(above|below|covers|out) 0\b", "", text)
    about = {name: [row for row in rows if row["arm"] == name] for name in {row["arm"] for row in rows}}
    everywhere = written([row for row in rows if row["split"] == "study"]) | {f"{rate:g}" for rate in RATES} | {"40"}
    found = []
    for line in text.splitlines():
        names = [name for name in re.findall(r"`([^`]+)`", line) if name in about and line.startswith("|")]
        known = everywhere if not names else written([about[name] for name in names])
        found += [number for number in NUMBER.findall(re.sub(r"`[^`]+`", "", line)) if number not in known]
    return found


def test_every_number_on_the_page_is_in_the_rows(whole):
    rows, page, _ = whole
    assert rows[-1]["split"] == "comparison" and "hold 95 % of 10,000" in page
    assert made_up(page, rows) == []
    spans = set(re.findall(r"`([^`]+)`", page))
    known = json.dumps(rows) + " ".join([*TITLES, COMMAND, "benchmarks/study/settings.py"])
    pairs = [pair for row in rows for name in ("versions", "digests") for pair in row.get(name, {}).items()]
    assert [span for span in spans if span not in known and tuple(span.split()) not in pairs] == []


def test_a_number_that_is_in_no_row_is_found(whole):
    rows, page, _ = whole
    line = next(line for line in page.splitlines() if line.startswith("| `tip` |"))
    false = page.replace(line, line.replace("| `tip` |", "| `tip` | 12.34 |")) + "In all, 17 arms gained 3.14 points."
    assert made_up(false, rows) == ["12.34", "17", "3.14"]


def test_the_search_for_numbers_finds_one_that_is_made_up():
    assert NUMBER.findall("52.13 (1.0 to +5.5), 10,000; -0.4 x3 abc1") == ["52.13", "1.0", "5.5", "10,000", "0.4"]


def test_no_arm_is_dropped(whole):
    _, page, folder = whole
    assert "No cell is missing." in page
    for name in ("student", "teacher", *ARMS):
        assert page.count(f"| `{name}` |") >= 3, name
        assert name in (folder / "study" / "accuracy.svg").read_text()
    for name in ARMS:
        assert f">{name}<" in (folder / "study" / "curves_tokens.svg").read_text(), name


def test_an_arm_without_a_title_is_on_the_page():
    page = page_of(study_rows(("gkd", "tsdkd")), {"gkd": "GKD"})
    assert page.count("| `tsdkd` |") >= 3


def test_an_arm_of_no_panel_is_drawn():
    rows = [{**row, "arm": "late"} for row in study_rows(("gkd",)) if row["arm"] == "gkd"]
    (panel,) = curves([row for row in summaries(rows) if row["split"] == "summary"], "step", "step").axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["late"]


def test_missing_cells_are_named():
    arms = ("gkd", "tsdkd", "tip", "no_gate", "precision_bf16")
    rows = [row for row in study_rows(arms) if row["arm"] != "no_gate" and row["split"] != "decisions"]
    rows = [row for row in rows if (row["arm"], row["seed"]) != ("tip", 3) and row["arm"] != "teacher"]
    rows = [row for row in rows if (row["arm"], row["split"], row.get("lr")) != ("gkd", "validation", 0.001)]
    page = page_of(rows, {arm: TITLES[arm] for arm in arms})
    missing = page.split("**Missing:**\n\n")[1].split("\n\n")[0].splitlines()
    assert missing == [
        "- `teacher` (the teacher): no cell of the test split",
        "- `gkd`: learning rates 0.001 of the grid",
        "- `tip`: seeds 3",
        f"- `no_gate` ({TITLES['no_gate']}): no cell of the test split",
        "- `no_gate`: learning rates 0.0003, 0.001, 0.003 of the grid",
        "- the decisions of the objective with a teacher in FP8",
    ]
    assert re.search(r"\| The gate helps \| .* \| not run \|  \| not run \|", page)
    assert "holds 1, does not hold 0, cannot be told 0, not run 12." in page  # of 10, and 3 families of the teacher


def test_a_smoke_study_has_a_page():
    """Two arms, one seed, one learning rate, no precision."""
    rows = [row for row in study_rows(("gkd", "tsdkd"), (1,)) if row["split"] != "decisions"]
    rows = [row for row in rows if row["split"] == "test" or row["lr"] == 0.001]
    page = page_of(rows, {name: TITLES[name] for name in ("gkd", "tsdkd")})
    assert "No cell is missing." in page and "Precision of the teacher" not in page
    assert "| `gkd` | " in page and "there is none" in page


def test_a_choice_at_the_grid_s_edge_is_said(whole):
    _, page, _ = whole
    assert re.search(r"\| `tip` \|.*\| 0\.003 \| highest \|", page)
    assert re.search(r"\| `gkd` \|.*\| 0\.001 \|  \|", page)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = study_rows(("gkd", "tsdkd"), (1,))
    rows += summaries(rows)
    for name in ("a", "b"):
        write_page(rows, tmp_path / name, TITLES, COMMAND)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_rows_that_contradict_each_other_are_refused():
    rows = study_rows(("gkd",), (1, 2))
    with pytest.raises(ValueError, match="two test rows of arm gkd, seed 2"):
        summaries([*rows, next(row for row in rows if row["seed"] == 2)])
    rows[2]["correct"] = rows[2]["correct"][1:] + "0"
    with pytest.raises(ValueError, match="arm gkd, seed 1: `correct` and `accuracy_by_family` disagree"):
        summaries(rows)
    with pytest.raises(ValueError, match="no summaries"):
        text_of(rows, TITLES, COMMAND)

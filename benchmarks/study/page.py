"""The page docs/study.md: tables and plots of the study's rows, each figure as it stands in results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.analysis import HOLDS, HOLDS_NOT, NOT_RUN, UNCLEAR, summaries
from benchmarks.study.claims import AGAINST, PRECISE, Question, is_precision, paper_questions, rule_questions
from benchmarks.study.markdown import (
    bullets,
    code,
    difference,
    image,
    listed,
    number,
    percent,
    span,
    states,
    table,
    values,
    versions,
    with_interval,
)
from benchmarks.study.plots import draw_all

__all__ = ["summaries", "text_of", "write_page"]

Row = dict[str, Any]
BASELINES = {"student": "the student, before distillation", "teacher": "the teacher"}
DECISIONS = {  # of benchmarks/fp8_teacher.py: field -> column
    "openers": "openers, %",
    "uncertain": "uncertain tokens, %",
    "gate_q50": "gate, median",
    "gate_q90": "gate, 90th percentile",
    "gate_q99": "gate, 99th percentile",
    "rankings": "rankings, %",
    "best": "best candidate, %",
    "pairs_turned": "pairs turned, %",
}


def write_page(results: Sequence[Row], folder: Path, titles: Mapping[str, str], command: str) -> None:
    """Write `study.md` into `folder` and its plots into `folder`/study; arguments as of `text_of`."""
    text = text_of(results, titles, command)
    draw_all([row for row in results if row["split"] == "summary"], folder / "study")
    (folder / "study.md").write_text(text, encoding="utf-8")


def text_of(results: Sequence[Row], titles: Mapping[str, str], command: str) -> str:
    """The page.

    Args:
        results: the rows of results.json, those of analysis.summaries among them (else ValueError).
        titles: of every arm that should have been run, by name; what is missing is named on the page.
        command: what made the rows.
    """
    page = _Page(results, titles)
    sections = [*page.head(command), *page.learning_rates(), *page.accuracy(), *page.claims(), *page.measures()]
    sections += [*page.families(), *page.curves(), *page.precision(), *page.limits()]
    return "\n\n".join(sections) + "\n"


class _Page:
    """The rows of a study, found by what they are about, and the page's sections of them."""

    def __init__(self, results: Sequence[Row], titles: Mapping[str, str]) -> None:
        self.rows: dict[str, list[Row]] = {}
        for row in results:
            self.rows.setdefault(row["split"], []).append(row)
        if "study" not in self.rows:
            raise ValueError("the rows have no summaries: add analysis.summaries(results) to them")
        (self.study,) = self.rows["study"]
        found = {row["arm"]: row for row in self.rows["summary"]}
        self.titles = BASELINES | dict(titles) | {arm: arm for arm in found if arm not in {**BASELINES, **titles}}
        self.summaries = {arm: found[arm] for arm in self.titles if arm in found}
        self.compared = {
            (row["arm"], row["against"], row["family"], row["at"]): row for row in self.rows.get("comparison", [])
        }
        self.grid: dict[str, dict[float, Row]] = {}
        for row in self.rows.get("validation", []):
            self.grid.setdefault(row["arm"], {})[row["lr"]] = row
        self.rates = sorted({rate for rows in self.grid.values() for rate in rows})
        self.main = [arm for arm in self.summaries if not is_precision(arm)]

    def head(self, command: str) -> list[str]:
        study = self.study
        families = ", ".join(f"{name} ({count} test problems)" for name, count in study["families"].items())
        cells = [row for split in ("test", "validation") for row in self.rows.get(split, [])]
        models = [row["digests"] for row in cells if "digests" in row]
        digests = {f"{name} {of[name]}" for of in models for name in ("student", "teacher")}
        verdicts = study["paper"]
        told = ", ".join(f"{name} {verdicts[name]}" for name in (HOLDS, HOLDS_NOT, UNCLEAR, NOT_RUN))
        return [
            "# The study: which objective, which tokens?",
            f"`{command}` made the results and wrote this page. Every figure on it is in "
            "[results.json](../benchmarks/study/results.json), and the plots draw what is there. "
            "No arm is left out and no seed is chosen.",
            f"The verdicts on the paper's claims that can be asked at this scale: {told}. "
            "[The table](#the-papers-claims) has each.",
            "## What was run",
            bullets(
                [
                    f"Tasks: reasoning-gym's {families}. A verifier scores greedy answers. Training, validation and "
                    "test problems differ, and the test split was read once.",
                    "Models: one teacher and one smaller student that saw fewer problems, both trained on right "
                    "solutions (`benchmarks/study/settings.py` has their sizes and the reasons). All arms share them. "
                    f"Digests of their weights: {code(sorted(digests))}.",
                    f"Budget: {study['steps']} steps an arm, the same prompts and batch sizes. {study['arms']} arms, "
                    f"seeds {listed(study['seeds'])}; {study['seconds']:,} seconds of training in all, the grid "
                    "of learning rates included.",
                    f"Revisions: {code(states(cells))}.",
                    f"CPU: {code(values(cells, 'cpu'))}, threads of a cell: {code(values(cells, 'threads'))}.",
                    f"Versions: {code(versions(cells))}.",
                ]
            ),
            f"Intervals hold {100 * study['level']:.0f} % of {study['resamples']:,} bootstrap resamples. Each draws "
            "seeds anew, and problems within each family. Intervals of differences are paired: both arms answer the "
            "same problems with the same seeds. Differences are in percentage points.",
            *self.missing(),
        ]

    def missing(self) -> list[str]:
        """What should be there and is not."""
        absent = []
        for arm, title in self.titles.items():
            seeds = {row["seed"] for row in self.rows.get("test", []) if row["arm"] == arm}
            wanted = {None} if arm in BASELINES else set(self.study["seeds"])
            if not seeds:
                absent.append(f"`{arm}` ({title}): no cell of the test split")
            elif wanted - seeds:
                absent.append(f"`{arm}`: seeds {listed(sorted(wanted - seeds))}")
            rates = [rate for rate in self.rates if rate not in self.grid.get(arm, {})]
            if rates and arm not in BASELINES and not is_precision(arm):
                absent.append(f"`{arm}`: learning rates {listed(f'{rate:g}' for rate in rates)} of the grid")
        if any(map(is_precision, self.titles)) and not self.rows.get("decisions"):
            absent.append("the decisions of the objective with a teacher in FP8")
        return ["**Missing:**", bullets(absent)] if absent else ["No cell is missing."]

    def learning_rates(self) -> list[str]:
        rows = []
        for arm in self.titles:
            if arm in BASELINES or is_precision(arm):
                continue
            summary, grid = self.summaries.get(arm, {}), self.grid.get(arm, {})
            found = [percent(grid[rate]["accuracy"]) if rate in grid else NOT_RUN for rate in self.rates]
            choice = f"{summary['lr']:g}" if "lr" in summary else NOT_RUN
            rows.append([f"`{arm}`", *found, choice, summary.get("grid_edge") or ""])
        at_edge = [arm for arm, row in self.summaries.items() if row.get("grid_edge")]
        return [
            "## Learning rates",
            "Accuracy on the validation split, %, with a seed of its own. Each arm takes its best. A choice at the "
            f"grid's edge might be beaten beyond it: {code(at_edge) or 'there is none'}.",
            table(["arm", *(f"{rate:g}" for rate in self.rates), "choice", "edge"], rows),
            "The arms of the teacher's precision take the choice of `no_entropy`.",
        ]

    def accuracy(self) -> list[str]:
        rows = []
        for arm in self.main:
            row = self.summaries[arm]
            differences = [self.difference(arm, against) for against in AGAINST]
            sampled = percent(row["sampled_accuracy"])
            rows.append([self.titles[arm], f"`{arm}`", str(row["seeds"]), with_interval(row), *differences, sampled])
        names = [f"minus `{against}`" for against in AGAINST]
        return [
            "## Accuracy",
            table(["arm", "name", "seeds", "accuracy, %", *names, "sampled, %"], rows),
            "*Sampled* is the accuracy of answers drawn at temperature 1, of a part of the problems.",
            image("accuracy.svg"),
        ]

    def difference(self, arm: str, against: str, family: str = "", at: str = "steps") -> str:
        row = self.compared.get((arm, against, family, at))
        if row is None:
            return "" if arm == against else NOT_RUN
        return difference(row)

    def claims(self) -> list[str]:
        study = self.study
        return [
            "## The paper's claims",
            "A claim holds where the whole interval of the difference is above 0, does not hold where it is below 0, "
            "and cannot be told where it covers 0.",
            self.answers(paper_questions(study["families"])),
            "## Selections against all tokens",
            "All take the reverse KL. At equal response tokens "
            f"({study['response_tokens']:,}, the fewest that a run of any arm ended with) the figures are "
            "interpolated on the validation split's curve, and the interval is of the seeds alone.",
            self.answers(rule_questions()),
            f"This page makes {study['comparisons']} comparisons, without a correction for their number: if no two "
            f"arms differed, about {study['expected_by_chance']:g} of their intervals would still leave out 0.",
        ]

    def answers(self, questions: Iterable[Question]) -> str:
        rows = []
        for question in questions:
            found = self.compared.get(question[1:])
            asked = f"`{question.arm}` minus `{question.against}`"
            asked += f", {question.family}" if question.family else ""
            asked += ", equal tokens" if question.at == "tokens" else ""
            answer = (
                [difference(found), f"{found['seeds_better']} of {found['seeds']}", found["verdict"]]
                if found
                else [NOT_RUN, "", NOT_RUN]
            )
            rows.append([question.claim, asked, *answer])
        return table(["claim", "asked as", "difference", "better in seeds", "verdict"], rows)

    def measures(self) -> list[str]:
        rows = []
        for arm, row in self.summaries.items():
            cells = [
                number(row["response_tokens"], ",.0f"),
                number(row["response_length"], ".1f"),
                percent(row["truncated"]),
                number(row["student_entropy"], ".3f"),
                percent(row["distinct"]),
                number(row["forward_kl"], ".3f"),
                number(row["reverse_kl"], ".3f"),
                number(row["seconds"], ",.0f"),
            ]
            rows.append([f"`{arm}`", *cells])
        columns = ["tokens trained on", "length", "truncated, %", "entropy", "distinct, %"]
        return [
            "## What else changed",
            "Means over the seeds. *Length* is of greedy answers, in tokens; *truncated* are those that reach the "
            "limit. On the student's own samples: its *entropy* and the divergences from the teacher, KL(teacher || "
            "student) and KL(student || teacher), in nats per token, and *distinct*, the share of different texts "
            "among a problem's samples. *Seconds* is the time of one training.",
            table(["name", *columns, "forward KL", "reverse KL", "seconds"], rows),
            image("beside.svg"),
        ]

    def families(self) -> list[str]:
        families = list(self.study["families"])
        rows = []
        for arm, row in self.summaries.items():
            parts = [(row["accuracy_by_family"][name], *row["interval_by_family"][name]) for name in families]
            rows.append([f"`{arm}`", *(f"{percent(mean)} {span(low, high)}" for mean, low, high in parts)])
        return ["## Accuracy by family, %", table(["name", *families], rows)]

    def curves(self) -> list[str]:
        rows = []
        for arm, row in self.summaries.items():
            if "at_equal_tokens" in row:
                last = row["curve"][-1]
                rows.append([f"`{arm}`", with_interval(row["at_equal_tokens"]), percent(last["accuracy"])])
        return [
            "## Curves on the validation split",
            image("curves_steps.svg"),
            image("curves_tokens.svg"),
            f"After {self.study['response_tokens']:,} response tokens, interpolated between two validations (the "
            "interval is of the seeds alone), and at the end:",
            table(["name", "accuracy at equal tokens, %", "at the end, %"], rows),
        ]

    def precision(self) -> list[str]:
        words = {HOLDS: "better", HOLDS_NOT: "worse", UNCLEAR: UNCLEAR}
        rows = []
        for arm in filter(is_precision, self.titles):
            if arm not in self.summaries:
                rows.append([self.titles[arm], f"`{arm}`", NOT_RUN, NOT_RUN, NOT_RUN])
                continue
            found = self.compared.get((arm, PRECISE, "", "steps"))
            saw = words[found["verdict"]] if found else ""
            accuracy = with_interval(self.summaries[arm])
            rows.append([self.titles[arm], f"`{arm}`", accuracy, self.difference(arm, PRECISE), saw])
        if not rows and not self.rows.get("decisions"):
            return []
        decisions = [
            [f"`{row['arm']}`", "bf16" if row["first_last_layers_bf16"] else "as the others"]
            + [number(row[field], ".4f") if field.startswith("gate") else percent(row[field]) for field in DECISIONS]
            for row in self.rows.get("decisions", [])
        ]
        return [
            "## Precision of the teacher",
            "The student trains in bf16 by the paper's objective without the entropy term: what is left reads the "
            "teacher. The frozen teacher alone changes, in all of its layers. FP8 is Transformer Engine's own Python "
            "over the tests' stand-in of its kernels: real bytes and scales, products in fp32, untested on a GPU.",
            table(["arm", "name", "accuracy, %", f"minus `{PRECISE}`", "saw"], rows),
            "Decisions of the objective that differ from those with both models in bf16, and the change of the gate:",
            table(["what is not bf16", "first, last layer", *DECISIONS.values()], decisions) if decisions else NOT_RUN,
        ]

    def limits(self) -> list[str]:
        return [
            "## Limits",
            bullets(
                [
                    "Toy scale: models thousands of times smaller than the paper's, short answers, easy arithmetic. "
                    "What holds here need not hold for large models, and what does not hold here may hold there.",
                    "One teacher and one student, trained once: the intervals know nothing of other pairs. Of seven "
                    "students the one was taken that GKD teaches something in so few steps.",
                    "Few seeds. Intervals of a bootstrap of so few are somewhat too narrow; *better in seeds* helps to "
                    "judge.",
                    "One setting of each objective, its paper's or a stated one; only the learning rate was tuned, on "
                    "a small grid with one seed.",
                    "Equal steps and tokens are not equal computation; the seconds are of a shared CPU.",
                ]
            ),
        ]

"""Problems of three reasoning-gym families with written-out solutions, and their split: what no model trains on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS
from transformers import PreTrainedTokenizerFast

from nemo_tsdkd.demo.tasks import Problem, train_tokenizer, written_steps

# reasoning-gym draws problem i of a data set from seed + i: seeds lie further apart than any data set is long.
SEEDS = {"test": 0, "validation": 10_000_000, "pretrain": 20_000_000, "distil": 30_000_000}
HELD_OUT = 200  # problems of each family in each held-out split, whatever a setting uses of them
MAX_NEW_TOKENS = 72  # the longest solution has 66 tokens


def _legs(problem: Problem) -> str:
    """Legs of each kind of animal, then their sums."""
    counts = problem["metadata"]["animals"]
    legs = {animal: count * ANIMALS[animal] for animal, count in counts.items()}
    lines = [f"{count} {animal}: {count} x {ANIMALS[animal]} = {legs[animal]}" for animal, count in counts.items()]
    total, *rest = legs.values()
    for term in rest:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return "\n".join([*lines, f"Answer: {total}"])


def _gcd(problem: Problem) -> str:
    """Euclid's remainders, one line each."""
    a, b = problem["metadata"]["numbers"]
    lines = []
    while b:
        lines.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return "\n".join([*lines, f"Answer: {a}"])


class Family(NamedTuple):
    """A reasoning-gym data set: its settings, how a solution is written, and what makes two problems the same."""

    settings: dict[str, Any]
    solution: Callable[[Problem], str]
    identity: Callable[[Problem], Any]


# From easy to hard: sums of what stands in the question; knowledge of each animal's legs, products and sums; divisions
# with a remainder, of which each depends on the one before.
FAMILIES = {
    "chain_sum": Family(
        {"min_terms": 4, "max_terms": 5, "min_digits": 1, "max_digits": 1},
        written_steps,
        lambda problem: problem["question"],
    ),
    "leg_counting": Family(
        {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 9},
        _legs,
        lambda problem: problem["question"],
    ),
    "gcd": Family(
        {"min_value": 1, "max_value": 60}, _gcd, lambda problem: tuple(sorted(problem["metadata"]["numbers"]))
    ),
}


def held_out(name: str, each: int) -> list[Problem]:
    """The first `each` different problems of every family of a held-out split, "test" or "validation", in turn."""
    assert each <= HELD_OUT, each
    return _in_turn([_kept_out(task, name)[:each] for task in FAMILIES])


def training(name: str, each: int) -> list[Problem]:
    """`each` problems of every family in turn, "pretrain" or "distil", none of them held out; some come twice."""
    families = []
    for task, family in FAMILIES.items():
        others = {family.identity(problem) for split in ("test", "validation") for problem in _kept_out(task, split)}
        drawn = [problem for problem in _draw(task, name, 2 * each) if family.identity(problem) not in others]
        families.append(drawn[:each])
    return _in_turn(families)


@cache
def _kept_out(task: str, name: str) -> list[Problem]:
    """HELD_OUT problems, all different, and those of "validation" different from those of "test"."""
    identity = FAMILIES[task].identity
    seen = {identity(problem) for problem in _kept_out(task, "test")} if name != "test" else set()
    different = {identity(problem): problem for problem in reversed(_draw(task, name, 3 * HELD_OUT))}
    return [problem for key, problem in different.items() if key not in seen][-HELD_OUT:]


def _draw(task: str, name: str, count: int) -> list[Problem]:
    return list(reasoning_gym.create_dataset(task, seed=SEEDS[name], size=count, **FAMILIES[task].settings))


def _in_turn(families: Sequence[list[Problem]]) -> list[Problem]:
    return [problem for together in zip(*families, strict=True) for problem in together]


def task_of(problem: Problem) -> str:
    return problem["metadata"]["source_dataset"]


def solution(problem: Problem) -> str:
    return FAMILIES[task_of(problem)].solution(problem)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One tokenizer for both models, trained on a sample of all families."""
    return train_tokenizer((problem["question"], solution(problem)) for problem in training("pretrain", 400))


def write_rows(path: Path, problems: Sequence[Problem]) -> Path:
    """Rows for training and validation: prompt and answer."""
    rows = ({"prompt": problem["question"], "answer": problem["answer"]} for problem in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

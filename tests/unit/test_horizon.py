"""The horizon of rollouts: its ends, its course, and that a step alone decides it."""

import math
from fractions import Fraction

import pytest

from nemo_tsdkd.config.schema import RolloutConfig
from nemo_tsdkd.rollout.horizon import horizon


def course(max_steps: int, **fields) -> list[int]:
    rollout = RolloutConfig(max_new_tokens=1000, **fields)
    rollout.validate()
    return [horizon(rollout, step, max_steps) for step in range(max_steps)]


def test_a_constant_horizon_is_the_longest_response():
    assert course(3) == [1000] * 3


@pytest.mark.parametrize(("first", "last"), [(10, 1000), (1, 2), (900, 30), (0, 40), (7, 0)])
@pytest.mark.parametrize("steps", [2, 3, 10, 97])
def test_a_linear_horizon_is_the_straight_line_rounded(steps, first, last):
    found = course(120, horizon="linear", horizon_from=first, horizon_to=last, horizon_steps=steps)
    first, last = first or 1000, last or 1000
    exact = [first + Fraction((last - first) * step, steps - 1) for step in range(steps)]
    assert found[:steps] == [math.floor(value + Fraction(1, 2)) for value in exact]
    assert (found[0], found[steps - 1]) == (first, last) and set(found[steps:]) == {last}


def test_a_cosine_horizon_is_slow_at_both_ends_and_meets_the_line_in_the_middle():
    given = {"horizon_from": 100, "horizon_to": 900, "horizon_steps": 101}
    cosine, linear = (course(120, horizon=name, **given) for name in ("cosine", "linear"))
    assert cosine[0] == 100 and cosine[50] == linear[50] == 500 and cosine[100:] == [900] * 20
    assert cosine == sorted(cosine) and cosine[25] == round(100 + 800 * math.sin(math.pi / 8) ** 2) < linear[25]
    assert all(a + b == 1000 for a, b in zip(cosine[:101], reversed(cosine[:101]), strict=True))


def test_the_whole_run_is_the_default_course_and_a_resumed_one_goes_on_in_it():
    whole = course(9, horizon="cosine", horizon_from=50)
    assert (whole[0], whole[-1]) == (50, 1000)
    rollout = RolloutConfig(max_new_tokens=1000, horizon="cosine", horizon_from=50)
    assert [horizon(rollout, step, 9) for step in (8, 3, 5)] == [whole[8], whole[3], whole[5]]  # in any order
    assert course(1, horizon="linear", horizon_from=50) == [1000]

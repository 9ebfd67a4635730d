"""Verifiers: what counts as an answer, what is right, and that none of them can hold up or end a run."""

import time

import pytest

from nemo_tsdkd.verifiers import VERIFIERS, Verdict, require_verifier, verdict
from nemo_tsdkd.verifiers.answers import final_answer
from nemo_tsdkd.verifiers.judge import judge_all

ENTRY = {"question": "1 + 2 =", "answer": "3", "metadata": {"source_dataset": "chain_sum"}}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 5", "5"),
        ("answer: 4, no.\nAnswer:  5\n", "5"),
        ("Answer: 5\nor 6", "5\nor 6"),
        ("<answer> a b </answer> as asked", "a b"),
        ("<answer>cut off by the lim", "cut off by the lim"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} Answer: 2", "2"),
        (r"Answer: \boxed{2}", "2"),
        ("Ann has 3 + 4\n#### 7", "7"),
        (r"\boxed{never closed", None),
        ("Answer: ", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_last_mark(text, answer):
    assert final_answer(text) == answer


def test_exact():
    responses = ["Answer: 12  eggs", "Answer: 12 eggs.", "12 eggs", "#### 12\n eggs"]
    reference = VERIFIERS["exact"].make().reference
    assert reference("3 * 4 = 12\n#### 12  eggs") == reference("12 eggs") == "12 eggs" and reference(7) == "7"
    verdicts = judge_all("exact", responses, ["12 eggs"] * 4)
    assert [v.correct for v in verdicts] == [True, False, False, True]
    assert [v.answer for v in verdicts] == ["12  eggs", "12 eggs.", None, "12\n eggs"]
    assert judge_all("exact", [], []) == []


def test_math_compares_values_and_a_response_that_never_ends_costs_its_own_verdict_alone():
    tower = "$9^{9^{9^{9}}}$"  # neither Python nor memory comes to its end
    responses = [r"so \boxed{\frac{1}{2}}", tower, "nothing", r"$0.25 + 0.25$", r"\boxed{3}"]
    begin = time.monotonic()
    verdicts = judge_all("math", responses, ["0.5", "7", "0.5", r"\frac{1}{2}", "x is what?"], time_limit=5.0)
    assert time.monotonic() - begin < 120
    assert [v.correct for v in verdicts] == [True, False, False, True, False]
    assert verdicts[1] == Verdict(False, None, "7", "no verdict within 5 s")
    assert verdicts[2] == Verdict(False, None, "0.5") and verdicts[0].answer == r"\frac{1}{2}"


def test_reasoning_gym_asks_the_task_of_the_entry():
    other = {**ENTRY, "metadata": {"source_dataset": "no_such_task"}}
    verdicts = judge_all(
        "reasoning_gym", ["1 + 2 = 3\nAnswer: 3", "3", "Answer: 4", "Answer: 3"], [*[ENTRY] * 3, other]
    )
    assert [v.correct for v in verdicts] == [True, False, False, False]
    assert [v.answer for v in verdicts] == ["3", None, "4", None] and {v.expected for v in verdicts} == {"3"}
    assert [v.error is None for v in verdicts] == [True, True, True, False] and "no_such_task" in verdicts[3].error


def test_a_process_that_ends_costs_one_verdict(monkeypatch, tmp_path):
    """As where a library's C code crashes, or the memory limit ends it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from nemo_tsdkd.verifiers.exact import Exact\n"
        "judge = Exact.judge\n"
        "Exact.judge = lambda self, response, reference: os._exit(9) if response == 'crash' else "
        "print('noise') or judge(self, response, reference)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, crashed, last = judge_all("exact", ["Answer: 1", "crash", "Answer: 1"], ["1"] * 3)
    assert first.correct and last.correct
    assert crashed == Verdict(False, None, "1", "the verifier's process has ended")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exact", ""),
        ("exact", None),
        ("exact", ["1"]),
        ("math", True),
        ("reasoning_gym", "no JSON"),
        ("reasoning_gym", {"answer": "3"}),
        ("reasoning_gym", {"answer": "3", "metadata": {"source_dataset": 3}}),
    ],
)
def test_a_reference_that_is_none(name, value):
    with pytest.raises(ValueError, match="must be"):
        VERIFIERS[name].make().reference(value)


def test_an_unknown_verifier_and_one_whose_package_is_missing_are_refused(monkeypatch):
    require_verifier("validation.verifier", "none")
    with pytest.raises(ValueError, match="must be one of exact, math, reasoning_gym"):
        require_verifier("validation.verifier", "vote")
    monkeypatch.setattr(verdict, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs math_verify. pip install 'nemo-tsdkd\[verify\]'"):
        require_verifier("validation.verifier", "math")

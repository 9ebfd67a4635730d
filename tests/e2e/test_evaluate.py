"""`nemo-tsdkd evaluate` with the installed harness: a task file of one's own, and the names of the paper's group."""

import json
from dataclasses import replace

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_tsdkd.cli import evaluate
from nemo_tsdkd.demo import pretrain, score, tasks

KNOWN, UNKNOWN = 6, 2
TASK_FILE = {
    "task": "chains",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": score.MAX_NEW_TOKENS, "do_sample": False},
    "filter_list": [
        {
            "name": "answer",
            "filter": [{"function": "regex", "regex_pattern": r"Answer: (-?\d+)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's student, trained for seconds: it knows six problems by heart."""
    folder = tmp_path_factory.mktemp("model")
    recipe = replace(pretrain.RECIPES["student"], written_share=1.0, steps=200)
    pretrain.train(recipe, tasks.training_problems(KNOWN, tasks.PRETRAIN_SEED), folder)
    return folder


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    problems = [*tasks.training_problems(KNOWN, tasks.PRETRAIN_SEED), *tasks.held_out_problems(UNKNOWN)]
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({key: problem[key] for key in ("question", "answer")}) + "\n" for problem in problems)
    )
    files = {"data_files": {"test": str(folder / "problems.jsonl")}}
    (folder / "chains.yaml").write_text(yaml.safe_dump({**TASK_FILE, "dataset_kwargs": files}))
    (folder / "again.yaml").write_text(yaml.safe_dump({**TASK_FILE, "task": "again", "dataset_kwargs": files}))
    (folder / "code.yaml").write_text(
        yaml.safe_dump({**TASK_FILE, "task": "code", "dataset_kwargs": files, "unsafe_code": True})
    )
    return folder


def run(model, task_folder, output, *arguments):
    command = ["--model", model, "--output", output, "--include-path", task_folder, *arguments]
    evaluate.main([str(argument) for argument in command])
    return json.loads(output.read_text())


def test_the_harness_and_our_score_agree_on_a_task_file_of_ones_own(model, task_folder, tmp_path):
    results = run(model, task_folder, tmp_path / "new" / "results.json", "--tasks", "chains")
    problems = [*tasks.training_problems(KNOWN, tasks.PRETRAIN_SEED), *tasks.held_out_problems(UNKNOWN)]
    share = results["results"]["chains"]["exact_match,answer"]
    assert share == score.accuracy(model, problems)
    assert share >= KNOWN / len(problems)
    assert results["n-samples"]["chains"] == {"original": KNOWN + UNKNOWN, "effective": KNOWN + UNKNOWN}


def test_limit_takes_the_first_problems(model, task_folder, tmp_path, capfd):
    results = run(model, task_folder, tmp_path / "results.json", "--tasks", "chains", "--limit", 3)
    out, err = capfd.readouterr()
    assert out.splitlines()[-2:] == ["chains  exact_match,answer  1.0000", str(tmp_path / "results.json")]
    assert len(out.splitlines()) == 2 and "task 1/1  chains" in err, (out, err)
    assert not (tmp_path / "results.json.log").exists()
    assert results["results"]["chains"]["exact_match,answer"] == 1.0
    assert results["n-samples"]["chains"]["effective"] == 3


def test_an_interrupted_evaluation_continues_with_the_missing_tasks(model, task_folder, tmp_path, monkeypatch):
    import lm_eval

    whole = run(model, task_folder, tmp_path / "whole.json", "--tasks", "chains,again")
    simple_evaluate, asked = lm_eval.simple_evaluate, []

    def preempted_in_the_second(**arguments):
        asked.extend(arguments["tasks"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return simple_evaluate(**arguments)

    monkeypatch.setattr(lm_eval, "simple_evaluate", preempted_in_the_second)
    output = tmp_path / "cut.json"
    with pytest.raises(KeyboardInterrupt):
        run(model, task_folder, output, "--tasks", "chains,again")
    assert json.loads(output.read_text())["tasks"] == ["chains"]
    assert run(model, task_folder, output, "--tasks", "chains,again") == whole
    assert asked == ["chains", "again", "again"]
    with pytest.raises(ValueError, match=r"holds scores of .*'limit': None.*, not of .*'limit': 1"):
        run(model, task_folder, output, "--tasks", "chains", "--limit", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "chains,nope"], "the harness has no nope"),
        (["--tasks", "code"], "code runs the code that the model writes .* --allow-code-execution"),
        (["--tasks", "chains", "--include-path", "missing"], "--include-path = missing: no such folder"),
        (["--tasks", "chains", "--model", "missing"], "not a Hugging Face model"),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(model, task_folder, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(model, task_folder, tmp_path / "results.json", *arguments)
    assert not (tmp_path / "results.json").exists()


def test_the_paper_group_names_ten_tasks_of_the_installed_harness():
    from lm_eval.tasks import TaskManager

    group, manager = OmegaConf.load(evaluate.GROUPS / "paper.yaml"), TaskManager()
    assert len(group) == 10 and evaluate.task_names("paper") == list(group.values())
    evaluate.check_tasks(list(group.values()), manager, allow_code_execution=True)
    with pytest.raises(ValueError, match=f"--tasks: {group.MBPP} runs the code"):
        evaluate.check_tasks(list(group.values()), manager, allow_code_execution=False)


def test_names_may_be_given_instead_of_a_group():
    assert evaluate.task_names("gsm8k,sciq") == ["gsm8k", "sciq"]

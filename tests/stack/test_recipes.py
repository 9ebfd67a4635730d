"""Each recipe of CONTRIBUTING.md does what it says: applied to a copy of the package, the copy has the extension."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipes
import tiny_hf

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "recipe_results.py"  # runs in the copy


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy with all recipes applied."""
    folder = recipes.copy_package(tmp_path_factory.mktemp("copy"))
    for blocks in recipes.sections().values():
        for block in blocks:
            recipes.apply(block, folder)
    return folder


@pytest.fixture(scope="module")
def seen(changed, tmp_path_factory):
    """What the copy computes, by recipe."""
    models = tmp_path_factory.mktemp("models")
    tiny_hf.save_hf(models / "mistral", "mistral", sliding_window=None)
    command, places = [sys.executable, "-W", "ignore", RESULTS, models], {"PYTHONPATH": str(changed)}
    done = subprocess.run(command, cwd=changed, env=places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_kind_of_extension_has_its_recipe():
    sections = recipes.sections()
    assert {title.removeprefix("A ") for title, blocks in sections.items() if blocks} == {
        "selection rule",
        "divergence",
        "term",
        "metric",
        "verifier",
        "configuration field",
        "model architecture",
    }


def test_the_new_files_pass_the_linter(changed):
    new = [block["path"] for blocks in recipes.sections().values() for block in blocks if block["path"]]
    ruff = Path(sys.executable).with_name("ruff")
    for command in (["check"], ["format", "--check"]):
        options = ["--no-cache", "--config", ROOT / "pyproject.toml"]
        run = subprocess.run([ruff, *command, *options, *new], cwd=changed, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_the_rule_chooses_the_tokens_that_the_teacher_finds_unlikely(seen):
    assert 0 < sum(seen["unlikely"]) < 16
    assert seen["opener_fraction"] == pytest.approx(sum(seen["unlikely"]) / 16)


@pytest.mark.parametrize("name", ["half_square", "entropy_gap"])
def test_value_and_gradient_are_those_of_autograd(seen, name):
    value, expected, gradient_error = seen[name]
    assert value == pytest.approx(expected, rel=1e-12) and gradient_error < 1e-12


def test_the_term_and_the_metric_are_reported(seen):
    assert seen["reported"] == ["divergence", "entropy_gap"] and seen["required"]


def test_the_field_has_a_rule_and_reaches_the_optimizer(seen):
    assert seen["refused"] == "optim.adam_eps = 0.0: must be greater than 0. Give a positive number."
    assert seen["adam_eps"] == 1e-6


def test_the_verifier_judges_in_its_own_process(seen):
    assert seen["ends_with"] == [[True, "7", None], [False, "is", None], [False, None, None]]


def test_the_architecture_is_imported_with_hugging_face_s_logits_and_other_settings_are_refused(seen):
    assert seen["imported"] and seen["sliding"].endswith("sliding_window = 8: must be null. Choose a model without it.")

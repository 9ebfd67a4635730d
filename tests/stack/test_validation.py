"""Validation in a run: its scores choose a checkpoint, end a run, survive a kill, and are those of Hugging Face."""

import json
from pathlib import Path

import pytest
import ranks
import tiny_run
from interruptions import Outcome, steps_done
from interruptions import _train as train_and_read

from nemo_tsdkd.checkpoints.best import Scores, best_checkpoint
from nemo_tsdkd.checkpoints.manifest import step_folder
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.reporting.last_words import last_words
from nemo_tsdkd.reporting.rows import read_samples
from nemo_tsdkd.verifiers import Verdict

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {"alone": (1, {}), "tp2_pp2": (4, {TP: 2, PP: 2})}


def configure(root: Path, run_dir: Path, layout: str) -> TrainConfig:
    """Ten steps, half of them on-policy, saved after 5 and 10 and at each best validation, which come every third."""
    world_size, parallel = LAYOUTS[layout]
    config = tiny_run.config(root, run_dir, world_size, lmbda=0.5, **parallel)
    config.max_steps, config.checkpoint.every_n_steps, config.checkpoint.keep_last = 10, 5, 1
    config.checkpoint.keep_best = True
    tiny_run.validate(config, root, 3, "exact")
    return config


def judge_by_text(name, responses, references):
    """What a model without any training scores with: a verdict that only the same text gets again."""
    return [
        Verdict(sum(map(ord, text)) % 3 == 0, text, reference)
        for text, reference in zip(responses, references, strict=True)
    ]


def judge_none_right(name, responses, references):
    return [Verdict(False, None, reference) for reference in references]


def train(config: TrainConfig, judge=judge_by_text) -> Outcome:
    from nemo_tsdkd.megatron import validation

    validation.judge_all = judge
    return train_and_read(config)


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    """(outcome, folder) of one process in one go."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    return ranks.run_ranks(train, 1, configure(root, run_dir, "alone"))[0], run_dir


def scored(outcome: Outcome) -> dict[int, float]:
    return {row["step"]: row["validation_accuracy"] for row in outcome.metrics if "validation_accuracy" in row}


def test_scores_stand_in_the_rows_of_their_steps_and_in_each_checkpoint(uninterrupted):
    outcome, run_dir = uninterrupted
    assert [row["step"] for row in outcome.metrics] == list(range(11))
    scores = scored(outcome)
    assert list(scores) == [0, 3, 6, 9, 10] and len(set(scores.values())) > 1
    assert outcome.metrics[0].keys() == {"step"} | {n for n in outcome.metrics[3] if n.startswith("validation_")}
    for row in (row for row in outcome.metrics if row["step"] in scores):
        assert row["validation_samples"] == 7 and (7 * row["validation_accuracy"]) % 1 == pytest.approx(0)
        assert row["validation_accuracy_low"] <= row["validation_accuracy"] <= row["validation_accuracy_high"]
    saved = Scores.read(step_folder(run_dir, 10))
    assert saved.metric == "validation_accuracy" and dict(saved.scores) == scores
    best = max((step for step in scores if step), key=lambda step: (scores[step], -step))
    assert best_checkpoint(run_dir)[0] == step_folder(run_dir, best)
    kept = {int(folder.name.removeprefix("step_")) for folder in (run_dir / "checkpoints").iterdir()}
    assert kept == {10, best}
    assert f"step_{best}: validation_accuracy {scores[best]:.1%} (" in last_words(run_dir)[0]
    assert f"; at the start validation_accuracy {scores[0]:.1%} (" in last_words(run_dir)[0]


def test_killed_and_resumed_in_any_layout_it_is_one_curve(root, uninterrupted, tmp_path):
    config = configure(root, tmp_path, "tp2_pp2")
    assert ranks.run_ranks(train, 4, config, kill_when=steps_done(config, 7)) is None
    outcome = ranks.run_ranks(train, 4, config)[0]
    expected, run_dir = uninterrupted
    assert scored(outcome) == scored(expected)
    for row, expected_row in zip(outcome.metrics, expected.metrics, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-6)
    assert Scores.read(step_folder(tmp_path, 10)).scores == Scores.read(step_folder(run_dir, 10)).scores
    assert best_checkpoint(tmp_path)[0].name == best_checkpoint(run_dir)[0].name
    found, reference = (read_samples(folder / "samples.jsonl") for folder in (tmp_path, run_dir))
    named = ("step", "kind", "index", "prompt", "response", "on_policy", "verdict")
    assert [[s[name] for name in named] for s in found] == [[s[name] for name in named] for s in reference]
    assert {s["on_policy"] for s in found} == {True, False}


def test_the_best_is_exported_and_answers_as_it_did_in_the_loop(uninterrupted, tmp_path):
    """Hugging Face's greedy answers, from the exported folder, to the prompts of the samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, run_dir = uninterrupted
    ranks.run_ranks(tiny_run.export, 1, run_dir / "best", "hf", tmp_path / "hf", meet=False)
    model, tokenizer = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    step = int(best_checkpoint(run_dir)[0].name.removeprefix("step_"))
    samples = read_samples(run_dir / "samples.jsonl")
    of_best = [s for s in samples if s["kind"] == "validation" and s["step"] == step]
    assert len(of_best) == 2
    for sample in of_best:
        inputs = tokenizer(sample["prompt"], return_tensors="pt")
        tokens = model.generate(inputs["input_ids"], do_sample=False, max_new_tokens=12)[0]
        written = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert written == sample["response"] and "".join(sample["tokens"]["text"]).startswith(written)
    with pytest.raises(ValueError, match=r"no complete checkpoint of .* has a validation"):
        tiny_run.export(tmp_path / "best", "hf", tmp_path / "refused")


def end_early(config: TrainConfig) -> list:
    """Three attempts on one rank: one that ends early, one that finds it ended, one with more patience."""
    from nemo_tsdkd.megatron import validation
    from nemo_tsdkd.megatron.train import train
    from nemo_tsdkd.reporting.rows import read_metrics

    validation.judge_all = judge_none_right
    found = []
    for patience in (2, 2, 4):
        config.validation.patience = patience
        train(config)
        summary = json.loads(Path(config.run_dir, "summary.json").read_text())
        finished = Path(config.run_dir, "FINISHED").exists()
        found.append((len(read_metrics(Path(config.run_dir, "metrics.jsonl"))), summary, finished))
    return found


def test_a_run_ends_after_so_many_validations_without_a_better_one(root, tmp_path):
    config = configure(root, tmp_path, "alone")
    config.checkpoint.keep_best = False
    first, again, longer = ranks.run_ranks(end_early, 1, config)[0]
    assert first == again == (7, {"steps": 6, "finished": True}, True)  # after steps 3 and 6, neither better than 0's
    assert longer == (11, {"steps": 10, "finished": True}, True)

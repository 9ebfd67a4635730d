"""The best checkpoint: by which scores, which one stays, and what a run says of it when it ends."""

import json

import pytest

from nemo_tsdkd.checkpoints.best import Scores, best_checkpoint, ended_early
from nemo_tsdkd.checkpoints.manifest import add_manifest, step_folder
from nemo_tsdkd.checkpoints.retention import begin_checkpoint, remove_old_checkpoints
from nemo_tsdkd.checkpoints.run_record import RunRecord
from nemo_tsdkd.reporting.accuracy import validation_metrics, wilson_interval
from nemo_tsdkd.reporting.last_words import last_words
from nemo_tsdkd.rollout.schedule import Response
from nemo_tsdkd.verifiers import Verdict

RECORD = RunRecord("run", "student", "tokenizer")


def save(run_dir, step, scores, of="a", higher=True, complete=True):
    """A checkpoint after `step` whose run has these scores so far."""
    folder = begin_checkpoint(run_dir, step, RECORD)
    metric = "validation_accuracy" if higher else "validation_divergence"
    Scores(metric, of, higher, [(s, v) for s, v in scores if s <= step]).write(folder)
    (folder / "weights").write_bytes(b"w")
    if complete:
        add_manifest(folder)
        (folder / "unfinished").unlink()
    return folder


def best_step(run_dir):
    found = best_checkpoint(run_dir)
    return found and int(found[0].name.removeprefix("step_"))


def test_the_best_is_the_first_with_the_best_score_that_is_on_the_disk(tmp_path):
    scores = [(0, 0.9), (2, 0.3), (4, 0.5), (6, 0.7), (8, 0.5)]
    assert best_checkpoint(tmp_path) is None
    for step in (2, 3, 4, 8):  # 3 was saved without a validation; 6 was not saved
        save(tmp_path, step, scores)
    assert best_step(tmp_path) == 4
    save(tmp_path, 6, scores, complete=False)
    assert best_step(tmp_path) == 4
    (step_folder(tmp_path, 4) / "validation.json").write_text("{")
    assert best_step(tmp_path) == 8


def test_a_divergence_is_best_where_it_is_small(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, [(2, 0.3), (4, 0.1), (6, 0.2)], higher=False)
    assert best_step(tmp_path) == 4


def test_scores_of_other_prompts_do_not_compare(tmp_path):
    save(tmp_path, 2, [(2, 0.9)], of="a")
    save(tmp_path, 4, [(4, 0.1)], of="b")
    save(tmp_path, 6, [(4, 0.1), (6, 0.05)], of="b")
    assert best_step(tmp_path) == 4


def test_retention_keeps_the_best_beside_the_newest(tmp_path):
    scores = [(1, 0.1), (2, 0.4), (3, 0.4), (4, 0.2), (5, 0.3)]
    for step in range(1, 6):
        save(tmp_path, step, scores)
        remove_old_checkpoints(tmp_path, step, "run", keep_last=1, keep_best=True)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_5"]
    remove_old_checkpoints(tmp_path, 5, "run", keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_5"]


@pytest.mark.parametrize(
    ("values", "since"),
    [([], 0), ([0.5], 0), ([0.5, 0.5], 1), ([0.5, 0.6, 0.6, 0.1], 2), ([0.5, 0.4, 0.3, 0.6], 0)],
)
def test_how_long_there_was_no_better_one(values, since, tmp_path):
    scores = Scores("validation_accuracy", "a", scores=list(enumerate(values)))
    assert scores.without_improvement == since
    folder = save(tmp_path, len(values) - 1, scores.scores) if values else tmp_path
    assert [ended_early(folder, patience) for patience in (0, 1, 2)] == [False, since >= 1, since >= 2]


def test_the_interval_is_wilsons():
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson_interval(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


def test_the_figures_of_a_validation():
    responses = [Response([1] * n, truncated=n > 3) for n in (2, 3, 4, 5)]
    verdicts = [Verdict(True, "1", "1"), Verdict(False, "2", "1"), Verdict(False, None, "1")]
    verdicts += [Verdict(False, None, "1", "no verdict within 10 s")]
    found = validation_metrics(responses, verdicts)
    assert found["validation_accuracy"] == 0.25 and found["validation_samples"] == 4
    assert (found["validation_length_mean"], found["validation_truncated_fraction"]) == (3.5, 0.5)
    assert (found["validation_unanswered_fraction"], found["validation_verifier_errors"]) == (0.25, 1)
    names = {"validation_samples", "validation_length_mean", "validation_truncated_fraction"}
    assert validation_metrics(responses, None).keys() == names


def test_the_last_words_name_the_best_its_score_and_the_export(tmp_path):
    run_dir = tmp_path / "a run"
    assert last_words(run_dir) == [f"{run_dir}/checkpoints holds no complete checkpoint"]
    scores = [(0, 0.2), (2, 0.6), (4, 0.5)]
    (run_dir / "checkpoints").mkdir(parents=True)
    rows = [{"step": s, "validation_accuracy": v, "validation_accuracy_low": v - 0.1} for s, v in scores]
    rows = [row | {"validation_accuracy_high": row["validation_accuracy"] + 0.1} for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(run_dir, 4, scores)
    kept = run_dir / "checkpoints" / "step_4"
    said = f"best checkpoint: {kept}: validation_accuracy 50.0% (40.0% to 60.0%)"
    better = "better was step 2, validation_accuracy 60.0% (50.0% to 70.0%), whose checkpoint is not kept: "
    export = f"export it: nemo-tsdkd export --checkpoint '{run_dir}/best' --to hf --output '{run_dir}/student-hf'"
    assert last_words(run_dir) == [
        f"{said}; at the start validation_accuracy 20.0% (10.0% to 30.0%)",
        f"{better}checkpoint.keep_best=true keeps it",
        export,
    ]
    save(run_dir, 2, scores)
    (run_dir / "report.html").touch()
    first, *rest = last_words(run_dir)
    assert first.startswith(f"best checkpoint: {run_dir}/checkpoints/step_2: validation_accuracy 60.0%")
    assert rest == [export, f"report: {run_dir}/report.html"]


def test_the_last_words_without_validation(tmp_path):
    folder = begin_checkpoint(tmp_path, 3, RECORD)
    (folder / "weights").write_bytes(b"w")
    add_manifest(folder)
    assert last_words(tmp_path) == [
        f"newest checkpoint: {folder}",
        f"export it: nemo-tsdkd export --checkpoint {tmp_path} --to hf --output {tmp_path}/student-hf",
    ]

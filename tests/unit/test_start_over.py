"""A run that has saved does not begin again at step 1 by itself, and goes on with its own student only."""

import json

import pytest

from nemo_tsdkd.checkpoints.manifest import (
    checkpoint_folders,
    files_to_list,
    find_damage,
    manifest_entries,
    step_folder,
)
from nemo_tsdkd.checkpoints.retention import begin_checkpoint, finish_checkpoint
from nemo_tsdkd.checkpoints.run_record import RunRecord, content_digest, open_record, student_digest
from nemo_tsdkd.checkpoints.start_over import begin_at_step_1

RECORD = RunRecord("ours", "student", "tokenizer")


def write(run_dir, step, complete=True):
    folder = begin_checkpoint(run_dir, step, RECORD)
    (folder / "weights").write_bytes(bytes(5000))
    if complete:
        finish_checkpoint(folder, manifest_entries(folder, files_to_list(folder)))
        (run_dir / "last_step").write_text(f"{step}\n")
    return folder


def damage(run_dir):
    return {folder: why for folder in checkpoint_folders(run_dir)[::-1] if (why := find_damage(folder))}


def start(run_dir, allowed=False):
    begin_at_step_1(run_dir, damage(run_dir), allowed)


def test_a_new_run_and_one_killed_before_its_first_save_begin(tmp_path):
    start(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    write(tmp_path, 2, complete=False)
    (tmp_path / "checkpoints" / "step_7").mkdir()  # a stranger's
    start(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def flip(folder):
    (folder / "weights").write_bytes(bytes([1]) + bytes(4999))


LOSSES = {
    "all damaged": (
        lambda run: [flip(folder) for folder in checkpoint_folders(run)],
        "step '12' was saved (last_step), but no checkpoint is complete: step_12: the content of weights has changed; "
        "step_8: the content of weights has changed. ",
    ),
    "checkpoints absent": (
        lambda run: (run / "checkpoints").rename(run / "elsewhere"),
        "but no checkpoint is complete: checkpoints/ is absent. Mount the disk",
    ),
    "checkpoints empty": (
        lambda run: ((run / "checkpoints").rename(run / "elsewhere"), (run / "checkpoints").mkdir()),
        "but no checkpoint is complete: checkpoints/ holds none. Mount the disk",
    ),
    "manifests lost": (
        lambda run: [(folder / "manifest.json").unlink() for folder in checkpoint_folders(run)],
        "step_8: it was not written to its end (no manifest)",
    ),
    "last_step lost, all damaged": (
        lambda run: ([flip(folder) for folder in checkpoint_folders(run)], (run / "last_step").unlink()),
        "checkpoints were saved, but no checkpoint is complete",
    ),
    "last_step damaged, checkpoints absent": (
        lambda run: ((run / "checkpoints").rename(run / "elsewhere"), (run / "last_step").write_bytes(b"\0\xff")),
        "was saved (last_step), but no checkpoint is complete: checkpoints/ is absent",
    ),
    "a finished run's checkpoints absent": (
        lambda run: (
            (run / "checkpoints").rename(run / "elsewhere"),
            (run / "last_step").rename(run / "FINISHED"),
        ),
        "FINISHED exists, but no checkpoint is complete: checkpoints/ is absent",
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_starting_over_is_refused_in_words_and_allowed_by_a_flag_that_loses_nothing(kind, tmp_path):
    lose, message = LOSSES[kind]
    write(tmp_path, 8), write(tmp_path, 12)
    (tmp_path / "metrics.jsonl").write_text('{"step": 12}\n')
    lose(tmp_path)
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(ValueError) as error:
        start(tmp_path)
    text = str(error.value)
    assert message in text and "checkpoint.start_over=true begins again at step 1" in text and "\n" not in text
    assert len(text) < 500 + len(str(tmp_path))
    start(tmp_path, allowed=True)
    assert sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) == before
    assert (tmp_path / "metrics.jsonl.set_aside").read_text() == '{"step": 12}\n'
    assert not (tmp_path / "last_step").exists() and checkpoint_folders(tmp_path) == []
    start(tmp_path)  # from now on it is a new run


def test_a_killed_start_over_is_refused_again(tmp_path, monkeypatch):
    from nemo_tsdkd.checkpoints import start_over

    write(tmp_path, 8), flip(step_folder(tmp_path, 8))
    set_aside = start_over.set_aside
    for path in ("step_8", "last_step"):

        def killed(given, path=path):
            if given.name == path:
                raise KeyboardInterrupt
            return set_aside(given)

        monkeypatch.setattr(start_over, "set_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, allowed=True)
        with pytest.raises(ValueError, match="start_over=true"):
            start(tmp_path)


def test_a_record_is_made_once_and_restored_from_a_checkpoint(tmp_path):
    first = open_record(tmp_path, None, "s", "t")
    assert open_record(tmp_path, None, "s", "t") == first == RunRecord.read(tmp_path)
    folder = begin_checkpoint(tmp_path, 4, first)
    (tmp_path / "run.json").write_text("{")
    assert open_record(tmp_path, folder, "s", "t") == first == RunRecord.read(tmp_path)


@pytest.mark.parametrize(("student", "tokenizer", "what"), [("x", "t", "student"), ("s", "x", "tokenizer")])
def test_another_student_or_tokenizer_is_refused_from_the_first_checkpoint_on(student, tokenizer, what, tmp_path):
    first = open_record(tmp_path, None, student, tokenizer)
    record = open_record(tmp_path, None, "s", "t")  # nothing was trained yet
    assert record.run == first.run
    folder = begin_checkpoint(tmp_path, 4, record)
    with pytest.raises(ValueError, match=rf"student\.path: its {what} is not the one .* \(digests x and [st]\)\. Give"):
        open_record(tmp_path, folder, student, tokenizer)
    assert RunRecord.read(tmp_path) == record


def test_a_run_from_before_there_were_records_gets_one(tmp_path):
    folder = step_folder(tmp_path, 3)
    folder.mkdir(parents=True)
    assert open_record(tmp_path, folder, "s", "t").student == "s"


def test_a_student_is_known_by_content_not_by_place(tmp_path):
    for name in "ab":
        (tmp_path / name / "weights").mkdir(parents=True)
        (tmp_path / name / "weights" / "x.distcp").write_bytes(bytes(1000))
    assert student_digest(tmp_path / "a") == student_digest(tmp_path / "b")
    (tmp_path / "b" / "weights" / "x.distcp").write_bytes(bytes(999) + b"\1")
    assert student_digest(tmp_path / "a") != student_digest(tmp_path / "b")
    vocabulary = {"a": 0, "é": 1, "\udc80": 2}
    same = content_digest(json.loads(json.dumps(vocabulary)))
    assert same == content_digest(dict(reversed(vocabulary.items()))) != content_digest({"a": 1, "é": 0, "\udc80": 2})

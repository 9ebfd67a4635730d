"""What a run removes is its own and superseded; anything else keeps its content."""

import json
from pathlib import Path

import pytest

from nemo_tsdkd.checkpoints import retention
from nemo_tsdkd.checkpoints.manifest import (
    checkpoint_folders,
    files_to_list,
    find_damage,
    manifest_entries,
    newest_complete,
    step_folder,
)
from nemo_tsdkd.checkpoints.retention import begin_checkpoint, finish_checkpoint, remove_old_checkpoints, was_saved
from nemo_tsdkd.checkpoints.run_record import RunRecord

OURS = RunRecord("ours", "student", "tokenizer")
THEIRS = RunRecord("theirs", "student", "tokenizer")


def write(run_dir, step, complete=True, record=OURS):
    folder = begin_checkpoint(run_dir, step, record)
    (folder / "weights").mkdir()
    (folder / "weights" / "__0_0.distcp").write_bytes(bytes([step]) * 5000)
    if complete:
        finish_checkpoint(folder, manifest_entries(folder, files_to_list(folder)))
    return folder


def names(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def tree(folder: Path):
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_newest_and_each_so_many_th_stay(tmp_path):
    for step in range(1, 9):
        write(tmp_path, step)
    remove_old_checkpoints(tmp_path, 8, "ours", keep_last=2, keep_every=3)
    assert names(tmp_path) == ["step_3", "step_6", "step_7", "step_8"]
    assert not any((folder / "unfinished").exists() for folder in checkpoint_folders(tmp_path))


def test_the_only_complete_checkpoint_stays(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2, complete=False)
    remove_old_checkpoints(tmp_path, 1, "ours", keep_last=1)
    assert newest_complete(tmp_path) == step_folder(tmp_path, 1)


def test_room_is_made_of_what_killed_saves_left(tmp_path):
    write(tmp_path, 50), write(tmp_path, 60, complete=False), write(tmp_path, 70, complete=False)
    folder = begin_checkpoint(tmp_path, 70, OURS)
    assert names(tmp_path) == ["step_50", "step_70"] and not (folder / "weights").exists()


def test_a_damaged_checkpoint_is_renamed_not_removed(tmp_path):
    write(tmp_path, 50), write(tmp_path, 100)
    (step_folder(tmp_path, 100) / "weights" / "__0_0.distcp").write_text("damaged")
    before = tree(step_folder(tmp_path, 100))
    write(tmp_path, 73)  # resumed from 50, saved early
    remove_old_checkpoints(tmp_path, 73, "ours", keep_last=1)
    assert names(tmp_path) == ["step_100", "step_73"]
    for aside in ("step_100.set_aside", "step_100.set_aside_2"):
        write(tmp_path, 100)
        remove_old_checkpoints(tmp_path, 100, "ours", keep_last=1)
        assert names(tmp_path)[-1] == aside
    assert tree(tmp_path / "checkpoints" / "step_100.set_aside") == before
    assert newest_complete(tmp_path) == step_folder(tmp_path, 100)


def test_a_checkpoint_that_lost_its_manifest_is_not_taken_for_a_killed_save(tmp_path):
    folder, killed = write(tmp_path, 50), write(tmp_path, 60, complete=False)
    (folder / "manifest.json").unlink()
    assert was_saved(folder) and not was_saved(killed)
    before = tree(folder)
    write(tmp_path, 70), remove_old_checkpoints(tmp_path, 70, "ours", keep_last=1)
    assert tree(folder) == before and names(tmp_path) == ["step_50", "step_70"]


@pytest.fixture
def other_run(tmp_path):
    """A checkpoint of another run, linked and copied into this one's folder."""
    other = write(tmp_path / "other", 5, record=THEIRS)
    ours = tmp_path / "ours" / "checkpoints"
    ours.mkdir(parents=True)
    return other, ours


def test_nothing_is_removed_through_a_link(other_run, tmp_path):
    other, ours = other_run
    for step in (1, 2, 3):
        (ours / f"step_{step}").symlink_to(other)
    (ours / "step_4").symlink_to("nowhere")
    before = tree(other)
    for step in (2, 3, 4):
        write(tmp_path / "ours", step)
        remove_old_checkpoints(tmp_path / "ours", step, "ours", keep_last=1)
    assert tree(other) == before and find_damage(other) is None
    assert (ours / "step_1").is_symlink() and (ours / "step_3.set_aside").is_symlink()
    assert names(tmp_path / "ours") == [
        "step_1",
        *(f"step_{n}.set_aside" for n in (2, 3)),
        "step_4",
        "step_4.set_aside",
    ]


def test_a_link_of_this_run_s_own_number_is_not_followed_either(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", 1)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_1").symlink_to(elsewhere)
    write(tmp_path / "run", 2), remove_old_checkpoints(tmp_path / "run", 2, "ours", keep_last=1)
    assert find_damage(elsewhere) is None


def test_what_the_run_did_not_write_stays(other_run, tmp_path):
    other, ours = other_run
    (other).rename(ours / "step_1")
    (ours / "step_2").write_text("a file named like a checkpoint")
    (ours / "step_3").mkdir()
    (ours / "step_3" / "notes.txt").write_text("a user's")
    for name in ("step_x", "step_4.txt", "step_05", "step_٣", "step_99999999999999999999"):
        (ours / name).mkdir()
    before = tree(ours)
    for step in (2, 3, 6, 7):
        write(tmp_path / "ours", step)
        remove_old_checkpoints(tmp_path / "ours", step, "ours", keep_last=1)
    after = tree(ours)
    renamed = {name.replace(".set_aside", ""): after[name] for name in after if not name.startswith("step_7/")}
    assert renamed == before
    assert [step_folder(tmp_path / "ours", n) for n in (1, 7)] == checkpoint_folders(tmp_path / "ours")


def test_a_removal_that_is_killed_leaves_nothing_that_counts_and_is_ended_later(tmp_path, monkeypatch):
    write(tmp_path, 1), write(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", lambda folder: None)
        remove_old_checkpoints(tmp_path, 2, "ours", keep_last=1)
    assert newest_complete(tmp_path) == step_folder(tmp_path, 2)
    assert find_damage(step_folder(tmp_path, 1)) == "it was not written to its end (no manifest)"
    begin_checkpoint(tmp_path, 3, OURS)
    assert names(tmp_path) == ["step_2", "step_3"]


def test_a_damaged_record_makes_a_checkpoint_nobody_s(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "run.json").write_text(json.dumps({"run": ["ours"]}))
    write(tmp_path, 2), remove_old_checkpoints(tmp_path, 2, "ours", keep_last=1)
    assert names(tmp_path) == ["step_1", "step_2"]

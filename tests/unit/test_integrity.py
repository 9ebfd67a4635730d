"""A checkpoint counts only when every byte is as it was written."""

import errno
import json
import logging
import os
import subprocess
import sys
import time

import pytest

from nemo_tsdkd.checkpoints import manifest
from nemo_tsdkd.checkpoints.atomic import atomic_folder
from nemo_tsdkd.checkpoints.manifest import (
    files_to_list,
    find_damage,
    has_manifest,
    manifest_entries,
    newest_complete,
    step_folder,
    write_manifest,
)


def write(run_dir, step, complete=True):
    folder = step_folder(run_dir, step)
    (folder / "weights").mkdir(parents=True)
    for rank in range(3):
        (folder / "weights" / f"__{rank}_0.distcp").write_bytes(bytes([step, rank]) * 5000)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    if complete:
        write_manifest(folder, manifest_entries(folder, files_to_list(folder)))
    return folder


def test_the_newest_by_number_is_found(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert newest_complete(tmp_path) == step_folder(tmp_path, 100)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_complete(tmp_path) is None


def truncate(folder):
    with (folder / "weights" / "__1_0.distcp").open("r+b") as file:
        file.truncate(9999)


def flip_a_bit(folder):
    with (folder / "weights" / "__2_0.distcp").open("r+b") as file:
        file.seek(7777)
        byte = file.read(1)[0]
        file.seek(7777)
        file.write(bytes([byte ^ 0x10]))


DAMAGES = {
    "unfinished": (lambda folder: (folder / "manifest.json").unlink(), "not written to its end"),
    "truncated": (truncate, "__1_0.distcp has 9999 bytes instead of 10000"),
    "bit flipped": (flip_a_bit, "the content of weights/__2_0.distcp has changed"),
    "file missing": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text('{"state.json": {'), "manifest cannot"),
    "manifest empty": (lambda folder: (folder / "manifest.json").write_text("{}"), "its manifest lists no file"),
    "manifest of another kind": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest cannot"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_the_log_gives_the_reason(kind, tmp_path, caplog):
    damage, reason = DAMAGES[kind]
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    damage(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path) == older
    assert str(newer) in caplog.text and reason in caplog.text
    shares = [[find_damage(folder, rank, 3) for rank in range(3)] for folder in (older, newer)]
    assert not any(shares[0]) and any(shares[1])


def test_ranks_describe_disjoint_shares_of_all_files(tmp_path):
    folder = write(tmp_path, 1, complete=False)
    shares = [manifest_entries(folder, files_to_list(folder)[rank::3]) for rank in range(3)]
    assert sum(len(share) for share in shares) == 4
    assert shares[0] | shares[1] | shares[2] == manifest_entries(folder, files_to_list(folder))


def test_a_file_that_cannot_be_read_is_damage_not_the_end(tmp_path, monkeypatch):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    read = manifest.digests

    def bad_disk(paths):
        if newer in paths[0].parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(paths)

    monkeypatch.setattr(manifest, "digests", bad_disk)
    assert find_damage(newer) == "it cannot be read ([Errno 5] Input/output error)"
    assert newest_complete(tmp_path) == older


def test_a_full_disk_while_writing_the_manifest_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    older, newer = write(tmp_path, 1), write(tmp_path, 2, complete=False)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(newer, {})
    assert not has_manifest(newer) and newest_complete(tmp_path) == older


SAVER = """
import sys
from pathlib import Path
from nemo_tsdkd.checkpoints.manifest import files_to_list, manifest_entries, write_manifest, step_folder
for step in range(1, 100_000):
    folder = step_folder(Path(sys.argv[1]), step)
    (folder / "weights").mkdir(parents=True)
    for rank in range(8):
        (folder / "weights" / f"{rank}").write_bytes(bytes([step % 256]) * 100_000)
    write_manifest(folder, manifest_entries(folder, files_to_list(folder)))
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_newest_complete_is_the_last_or_one_just_saved(tmp_path):
    for attempt in range(5):
        run_dir = tmp_path / str(attempt)
        with subprocess.Popen([sys.executable, "-c", SAVER, str(run_dir)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(0.013 * attempt)
            process.kill()
            reported = [int(line) for line in process.stdout.read().split()]
        last = max([1, *reported])
        assert newest_complete(run_dir) in (step_folder(run_dir, last), step_folder(run_dir, last + 1))


def test_a_folder_is_written_atomically(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("all")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "all" and list(tmp_path.iterdir()) == [target]


def test_the_first_of_two_folders_stays(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "mine").write_text("")
        target.mkdir()
        (target / "theirs").write_text("")
    assert [p.name for p in target.iterdir()] == ["theirs"]

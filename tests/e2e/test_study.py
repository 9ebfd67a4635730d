"""The study's flow at its smallest: `make study STUDY=smoke` is this command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def study(runs: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.study", "--setting", "smoke", "--runs", str(runs), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("study")
    study(runs)
    return runs


def test_two_arms_are_trained_scored_and_reported(runs):
    rows = json.loads((runs / "smoke" / "results.json").read_text())
    assert all({"arm", "seed", "accuracy", "steps", "response_tokens"} <= row.keys() for row in rows)
    cells = {row["arm"]: row for row in rows if row["split"] == "test" and row["seed"]}
    assert cells.keys() == {"gkd", "tsdkd"}
    for row in cells.values():
        assert len(row["correct"]) == 24 and row["accuracy"] == row["correct"].count("1") / 24
        assert [point["step"] for point in row["curve"]] == [0, 2]
        assert row["response_tokens"] == row["curve"][-1]["response_tokens"] > 0
        assert row["forward_kl"] > 0 and row["reverse_kl"] > 0
    one, other = (row["digests"] for row in cells.values())
    assert one["student"] == other["student"] and len({one["student"], one["trained"], other["trained"]}) == 3
    page = (runs / "smoke" / "docs" / "study.md").read_text()
    assert "TSD-KD" in page and list((runs / "smoke" / "docs" / "study").glob("*.svg"))


def test_a_second_call_keeps_the_cells_and_one_made_anew_is_equal_bit_for_bit(runs):
    kept = {path: path.stat().st_mtime_ns for path in (runs / "smoke" / "cells").iterdir()}
    assert "are the same" in study(runs, "--again", "tsdkd", "1")
    assert {path: path.stat().st_mtime_ns for path in (runs / "smoke" / "cells").iterdir()} == kept

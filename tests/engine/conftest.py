"""The fork server of this folder holds the stack over Transformer Engine (`te_stand_in`), and so do its models."""

import os

import pytest
import ranks
import te_stand_in
import tiny_run
from te_stand_in import wheel


@pytest.fixture(scope="session", autouse=True)
def engine():
    """Ranks with Transformer Engine; skips where its wheel cannot be had, and where a GPU takes the real one."""
    if ranks.HAS_GPU:
        pytest.skip("the stand-in is for machines without a GPU; there, tests/stack/test_gpu.py runs")
    try:
        te_stand_in.start_ranks()
    except wheel.Unavailable as error:
        assert "CI" not in os.environ, error
        pytest.skip(f"Transformer Engine's wheel cannot be downloaded: {error}")
    ranks.run_ranks(te_stand_in.require_active, 1)


@pytest.fixture(scope="session")
def root(tmp_path_factory, engine):
    """Folder with a tiny student, a teacher and data (`tiny_run.prepare`), in Transformer Engine's layers."""
    return tiny_run.prepare(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory, engine):
    """As `root`, both of four layers, with hidden states a block of 128 wide, which sequence parallelism gathers."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4}
    return tiny_run.prepare(tmp_path_factory.mktemp("wide"), **sizes)

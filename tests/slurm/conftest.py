"""One Slurm lab for all tests of this folder."""

import os

import pytest
import slurm_lab


@pytest.fixture(scope="session")
def lab():
    """Slurm with four nodes of eight fake GPUs, up while the session lasts."""
    why = slurm_lab.unavailable()
    if why:
        assert "CI" not in os.environ, why
        pytest.skip(why)
    slurm_lab.lab("down")  # of a session that was killed
    slurm_lab.lab("up")
    yield slurm_lab.lab
    slurm_lab.lab("down")

"""Ranks from Slurm's or torchrun's variables."""

import os

import pytest

from nemo_tsdkd.distributed import launch

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-10]",
}


@pytest.fixture
def clean(monkeypatch):
    """An environment with none of the launchers' variables; whatever the test sets is gone after it."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "TSDKD_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "to be restored")  # registers the name, so that what `environment` sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "to be restored")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    return monkeypatch


def slurm_step(patch, **extra):
    for name, value in {**STEP, **extra}.items():
        patch.setenv(name, value)


def test_slurm_step(clean):
    slurm_step(clean, TSDKD_HOSTS="gpu07 gpu08 gpu09 gpu10")
    here = launch.environment()
    assert here == launch.Launch(
        rank=5, local_rank=1, world_size=8, node=2, master_addr="gpu07", master_port=15000 + 4567
    )
    assert os.environ["RANK"] == "5" and os.environ["WORLD_SIZE"] == "8"


def test_slurm_step_expands_its_nodes_with_scontrol(clean, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-10]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(0o755)
    clean.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm_step(clean)
    assert launch.environment().master_addr == "gpu07"


def test_slurm_step_without_scontrol_names_what_to_export(clean):
    clean.setenv("PATH", "/nonexistent")
    slurm_step(clean)
    with pytest.raises(ValueError, match="Export TSDKD_HOSTS"):
        launch.environment()


def test_a_user_s_master_address_wins(clean):
    slurm_step(clean, MASTER_ADDR="10.0.0.1", MASTER_PORT="2222")
    here = launch.environment()
    assert (here.master_addr, here.master_port) == ("10.0.0.1", 2222)


def test_torchrun_inside_slurm_keeps_torchrun_s_ranks(clean):
    torchrun = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    slurm_step(clean, **torchrun, GROUP_RANK="0", TORCHELASTIC_RUN_ID="none")
    assert launch.environment() == launch.Launch(
        rank=3, local_rank=3, world_size=4, node=0, master_addr="n1", master_port=29500
    )
    assert os.environ["TORCHELASTIC_RUN_ID"] == "none"


@pytest.mark.parametrize(
    "extra",
    [
        {"RANK": "5", "LOCAL_RANK": "1"},  # pyxis, in an image that sets PYTORCH_VERSION
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu07", "MASTER_PORT": "19567"},  # enroot
    ],
)
def test_what_a_container_runtime_sets_is_not_torchrun(clean, extra):
    slurm_step(clean, TSDKD_HOSTS="gpu07 gpu08 gpu09 gpu10", **extra)
    assert launch.environment() == launch.Launch(
        rank=5, local_rank=1, world_size=8, node=2, master_addr="gpu07", master_port=19567
    )
    assert os.environ["TORCHELASTIC_RUN_ID"] == "slurm-1234567" and os.environ["GROUP_RANK"] == "2"


def test_another_launcher_s_variables_are_taken_as_they_are(clean):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"}.items():
        clean.setenv(name, value)
    clean.setenv("MASTER_PORT", "29500")
    assert launch.environment() == launch.Launch(
        rank=1, local_rank=1, world_size=2, node=0, master_addr="n1", master_port=29500
    )


def test_batch_script_without_srun_is_a_world_of_one(clean):
    slurm_step(clean)
    clean.delenv("SLURM_STEP_NUM_TASKS")
    assert launch.environment().world_size == 1


def test_lightning_takes_torchelastic_and_leaves_our_signals_alone(clean):
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    slurm_step(clean, TSDKD_HOSTS="gpu07")
    launch.environment()
    assert TorchElasticEnvironment.detect()
    chosen = TorchElasticEnvironment()
    assert (chosen.global_rank(), chosen.local_rank(), chosen.node_rank(), chosen.world_size()) == (5, 1, 2, 8)
    assert (chosen.main_address, chosen.main_port) == ("gpu07", 19567)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, "nemo-tsdkd train 'run_dir=a b'"),
        (STEP | {"TSDKD_HOSTS": "gpu07"}, "srun nemo-tsdkd train 'run_dir=a b'"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"},
            "torchrun --nproc-per-node 4 -m nemo_tsdkd train 'run_dir=a b'",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"},
            "torchrun --nnodes 2 --nproc-per-node 8 -m nemo_tsdkd train 'run_dir=a b'",
        ),
    ],
    ids=["alone", "slurm", "torchrun", "torchrun on two nodes"],
)
def test_the_line_that_starts_a_command_again(clean, variables, line):
    for name, value in variables.items():
        clean.setenv(name, value)
    launch.environment()
    assert launch.command_line(["train", "run_dir=a b"]) == line

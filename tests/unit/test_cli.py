"""The command as a user types it: help, errors and exit status, without the heavy stack."""

import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny_hf
from omegaconf import OmegaConf

import nemo_tsdkd.cli.main
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.distributed.signals import Stopped
from nemo_tsdkd.rollout.schedule import Schedule

HF_BARS = "HF_DATASETS_DISABLE_PROGRESS_BARS"
OPEN = ["run_dir=run", "student.path=/nowhere", "teacher.path=/nowhere", "data.path=data.jsonl"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID", HF_BARS):
        monkeypatch.setenv(name, "0")  # so that monkeypatch takes back whatever launch.environment() sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(
        nemo_tsdkd.cli.main, "exit_on_stop_signals", lambda command, prints: None
    )  # this is pytest's process


def run(capsys, *argv):
    """(exit status, stdout, stderr) of `nemo-tsdkd *argv`."""
    status = 0
    try:
        nemo_tsdkd.cli.main.main(argv)
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_hf.save_hf(folder / "model")
    (folder / "d.jsonl").write_text('{"prompt": "Ann has 3 boxes", "a b": "Ann"}\n')
    return [
        f"run_dir={folder}/run",
        f"student.path={folder}/model",
        f"teacher.path={folder}/model",
        f"data.path={folder}/d.jsonl",
    ]


def test_help_names_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(
        f"  {name}" in out for name in ("train", "check", "import", "export", "generate", "evaluate", "preflight")
    )


def test_check_prints_a_configuration_that_can_be_read_back(capsys, overrides):
    status, out, _ = run(capsys, "check", "--config-name", "tiny", *overrides, "objective.beta=0.5")
    assert status == 0
    config = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.create(out))
    assert config.objective.beta == 0.5
    assert "# valid for 1 ranks: TP 1 x PP 1 x CP 1 x DP 1\n# the fullest GPU needs about" in out


def test_options_and_overrides_mix(capsys, overrides):
    plain = run(capsys, "check", "--config-name", "tiny", *overrides, "seed=3")
    assert run(capsys, "check", "seed=3", "--config-name", "tiny", "--", *overrides) == plain


@pytest.mark.parametrize("command", ["check", "train"])
def test_bad_input_is_one_line_and_status_2(capsys, command):
    for arguments, message in {
        (): "leaves open: data.path, run_dir, student.path, teacher.path",
        ("objective.betta=1",): "Key 'betta' not in 'ObjectiveConfig' at objective.betta.",
        (*OPEN, "objective.beta=2"): "objective.beta = 2.0: must lie in [0, 1].",
        tuple(OPEN): "student.path = '/nowhere': no such folder.",
    }.items():
        status, out, err = run(capsys, command, "--config-name", "tiny", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("nemo-tsdkd: error: ") and message in err


def test_check_knows_the_selection_rules(capsys, overrides):
    status, _, err = run(capsys, "check", "--config-name", "tiny", *overrides, "objective.gate_rule=sharp")
    assert status == 2 and "objective.gate_rule = 'sharp': must be one of" in err


def test_a_wrong_setting_is_not_blamed_on_a_node_by_preflight(capsys, overrides):
    status, out, err = run(capsys, "preflight", "--config-name", "tiny", *overrides, "objective.beta=2")
    assert (status, out) == (2, "") and "objective.beta = 2.0: must lie in [0, 1]" in err


def test_the_error_s_origin_on_request():
    with pytest.raises(ValueError, match="leaves open"):
        nemo_tsdkd.cli.main.main(["--traceback", "check", "--config-name", "tiny"])


def test_one_rank_of_each_node_prints_the_error(capsys, monkeypatch):
    for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.setenv(variable, "1")
        assert run(capsys, "check", "--config-name", "tiny") == (2, "", "")
        monkeypatch.delenv(variable)


def raise_key_error(argv):
    raise KeyError("a defect")


def schedule_nothing(argv):
    Schedule([[]], batch_size=1, max_new_tokens=1, max_length=2, eos_ids=[0])


@pytest.mark.parametrize(("main", "kind"), [(raise_key_error, KeyError), (schedule_nothing, ValueError)])
def test_a_defect_keeps_its_traceback(monkeypatch, main, kind):
    """On every rank. A ValueError of the package's own that is no UserError is a defect too."""

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.checks.preflight", types.SimpleNamespace(main=main))
    with pytest.raises(kind) as raised:
        nemo_tsdkd.cli.main.main(["preflight"])
    assert raised.type is kind


@pytest.fixture
def trained(monkeypatch):
    configs = []  # the real one is tested in tests/stack
    stand_in = types.SimpleNamespace(train=lambda config: configs.append(config))
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron", types.SimpleNamespace(train=stand_in))
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron.train", stand_in)
    return configs


def test_train_gets_the_typed_configuration(capsys, overrides, trained):
    status, said, error = run(capsys, "train", "--config-name", "tiny", *overrides, "objective=gkd", "seed=9")
    assert (status, error) == (0, "") and said.endswith("checkpoints holds no complete checkpoint\n")
    assert [(type(c), c.seed, c.objective.preset) for c in trained] == [(TrainConfig, 9, "gkd")]


def test_train_needs_as_many_ranks_as_the_layout(capsys, overrides, trained):
    status, _, err = run(capsys, "train", "--config-name", "tiny", *overrides, "parallel.gpus_per_node=2")
    assert status == 2 and "parallel.gpus_per_node = 2: but 1 ranks were started" in err and trained == []


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (2, 130), (1, 129)])
def test_the_last_line_of_a_stopped_run_gives_the_checkpoint_and_the_resume_command(
    signum, status, capsys, overrides, trained, monkeypatch
):
    stopped = Stopped(signum, 7, Path("run dir", "checkpoints", "step_7"))
    monkeypatch.setattr(sys.modules["nemo_tsdkd.megatron.train"], "train", lambda config: stopped)
    result = run(capsys, "train", "--config-name", "tiny", *overrides, "data.prompt_column='a b'")
    command = shlex.join(["nemo-tsdkd", "train", "--config-name", "tiny", *overrides, "data.prompt_column='a b'"])
    name = signal.Signals(signum).name
    line = f"nemo-tsdkd: {name}: stopped after step 7, saved in run dir/checkpoints/step_7. Go on with: {command}\n"
    assert result == (status, "", line)


def test_console_script_and_module_are_the_same():
    for command in (["nemo-tsdkd"], [sys.executable, "-m", "nemo_tsdkd"]):
        command[0] = command[0].replace("nemo-tsdkd", f"{sys.prefix}/bin/nemo-tsdkd")
        done = subprocess.run([*command, "check", "--config-name", "nope"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("nemo-tsdkd: error: configuration 'nope': Cannot find primary config 'nope'.")


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_conversion_prints_its_path_alone_on_stdout(command, tmp_path, monkeypatch, capfd):
    """So that $(nemo-tsdkd import ...) works, whatever libraries print there."""

    def convert(source, output):
        os.write(1, b"a library\n")  # the descriptor: pytest's sys.stdout does not go through it
        (output / "weights").write_text("w")

    fake = types.SimpleNamespace(import_hf=convert, export_hf=convert, export_nemo=None)
    for name in ("nemo_tsdkd.megatron", "nemo_tsdkd.megatron.checkpoints"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron.checkpoints.convert", fake)
    target = tmp_path / "target"
    if command == "import":
        arguments = ["--source", str(tiny_hf.save_hf(tmp_path / "source"))]
    else:
        monkeypatch.setattr("nemo_tsdkd.cli.convert._checkpoint_in", lambda folder: folder)
        arguments = ["--checkpoint", str(tmp_path), "--to", "hf"]
    capfd.readouterr()
    nemo_tsdkd.cli.main.main([command, *arguments, "--output", str(target)])
    assert capfd.readouterr().out == f"{target}\n"
    assert (target / "weights").read_text() == "w" and not (tmp_path / "target.log").exists()

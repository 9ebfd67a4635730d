"""`nemo-tsdkd init`: its files are what the other commands and the job scripts' library take."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_hf

from nemo_tsdkd.cli.main import main
from nemo_tsdkd.config.compose import compose_config

REAL = (Path(__file__).parents[2] / "slurm" / "lib.sh").read_text()
# In the place of slurm/lib.sh, which needs a job: its own reading of arguments, and a `train` that shows what it gets.
LIBRARY = (
    "".join(
        re.search(rf"^{name}\(\) \{{.*?^\}}\n", REAL, re.MULTILINE | re.DOTALL)[0]
        for name in ("usage_error", "options_after_dashes")
    )
    + 'say() { echo "$@"; }\ntrain() { printf "%s\n" "$RUN_DIR" "$@"; }\n'
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("the models of 'Tim' and \"Ann\"")
    tiny_hf.save_hf(folder / "model")
    (folder / "d.jsonl").write_text('{"prompt": "Ann has 3 boxes"}\n')
    return folder


@pytest.fixture
def arguments(models, tmp_path):
    checkout = tmp_path / "a checkout, 'mine'"
    (checkout / "slurm").mkdir(parents=True)
    (checkout / "slurm" / "lib.sh").write_text(LIBRARY)
    model = str(models / "model")
    return [
        *("init", str(tmp_path / "a run"), "--student", model, "--teacher", model, "--data", str(models / "d.jsonl")),
        *("--nodes", "2", "--gpus-per-node", "4", "--teacher-tp", "2", "--seq-length", "64", "--partition", "big"),
        *("--checkout", str(checkout)),
    ]


def test_what_it_writes_is_valid_and_reaches_the_job(arguments, models, tmp_path, capsys):
    main(arguments)
    folder = tmp_path / "a run"
    said = capsys.readouterr()
    assert "# valid for 8 ranks" in said.out and f"next: sbatch '{folder}/distil.sh'" in said.err
    config = compose_config("distil", config_dir=folder)
    assert config.student.path == config.teacher.path == str(models / "model")
    assert (config.data.path, config.data.seq_length) == (str(models / "d.jsonl"), 64)
    assert config.parallel.world_size == 8 and config.teacher_parallel.tensor_model_parallel_size == 2
    script = (folder / "distil.sh").read_text()
    header = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --partition=big"} <= set(header)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "-S", "warning", folder / "distil.sh"], check=True)
    command = ["bash", folder / "distil.sh", "--", "optim.lr=1e-6", "data.path=a b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    expected = [str(folder / "run"), "distil", "--", "--config-dir", str(folder), "optim.lr=1e-6", "data.path=a b"]
    assert done.stdout.splitlines() == expected
    assert subprocess.run([*command[:2], "optim.lr=1"], capture_output=True).returncode == 2
    with pytest.raises(SystemExit):
        main(arguments)
    assert "distil.yaml is there already" in capsys.readouterr().err


def test_it_asks_on_a_terminal_for_what_is_missing(arguments, models, tmp_path, monkeypatch):
    at = arguments.index("--data")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", {"data: ": f" {models / 'd.jsonl'} "}.__getitem__)
    main(arguments[:at] + arguments[at + 2 :])
    assert compose_config("distil", config_dir=tmp_path / "a run").data.path == str(models / "d.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data": ""}, "--data is missing. Give it, or call init on a terminal."),
        ({"--data": "${oc.env:HOME}"}, "--data = ${oc.env:HOME}: holds ${"),
        ({"--partition": "a b"}, "--partition = 'a b': must be letters, digits"),
        ({"--checkout": "/nowhere"}, "--checkout = /nowhere: has no slurm/lib.sh"),
        ({"--global-batch-size": "3"}, "global_batch_size = 3"),
    ],
)
def test_bad_arguments_are_named(arguments, changes, message, capsys):
    for flag, value in changes.items():
        arguments = [*arguments, flag, value]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error
    assert ("Change " in error) == ("--global-batch-size" in changes)  # its files are written and wait to be changed

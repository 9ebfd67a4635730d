"""The preflight's checks, one by one, and how ranks report; the Slurm lab runs all of it."""

import re
import shutil
import socket
import threading
from importlib.metadata import PackageNotFoundError

import pytest
import ranks
import tiny_hf
import torch
from torch.distributed import HashStore

from nemo_tsdkd.checkpoints.shape import QWEN2_5
from nemo_tsdkd.checks import probes
from nemo_tsdkd.checks.memory import GIB
from nemo_tsdkd.checks.preflight import Finding, Preflight, _grouped, _version_differences
from nemo_tsdkd.checks.start import check_weights
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import HostError, UserError
from nemo_tsdkd.distributed.groups import process_group
from nemo_tsdkd.distributed.launch import Launch
from nemo_tsdkd.reporting import provenance


def place(rank, world_size=2, port=0):
    """Rank `rank` of a world with one rank a node."""
    return Launch(rank=rank, local_rank=0, world_size=world_size, node=rank, master_addr="127.0.0.1", master_port=port)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_hf.save_hf(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TSDKD_HOSTS", "left right")
    c = TrainConfig(run_dir=str(tmp_path / "run"))
    c.student.path = c.teacher.path = str(model)
    c.data.path = str(tmp_path / "prompts.jsonl")
    c.data.seq_length, c.rollout.max_new_tokens = 64, 16
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Ann has 3 boxes"}\n')
    c.parallel.num_nodes = 2
    return c


def test_complete_weights_pass(model):
    check_weights(model)


def test_weights_cut_short_are_named(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors: not a complete safetensors file"):
        check_weights(folder)


def test_a_shard_that_the_index_lists_must_be_there(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors"):
        check_weights(folder)


@pytest.mark.parametrize("files", [{}, {"__0_0.distcp": ""}])
def test_a_nemo_checkpoint_without_content(files, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "metadata.json").write_text("{}")
    for name, text in files.items():
        (tmp_path / "weights" / name).write_text(text)
    with pytest.raises(ValueError, match=r"\.distcp files are missing or empty"):
        check_weights(tmp_path)


def test_no_gpu_is_an_error_unless_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        probes.check_gpu(place(0), 1, allow_cpu=False)
    probes.check_gpu(place(0), 1, allow_cpu=True)


@pytest.mark.parametrize(
    ("count", "used", "message"), [(7, 0, "7 GPUs are visible"), (8, 12 * GIB, r"GPU 0 already has 12\.0 GiB in use")]
)
def test_gpus_that_are_missing_or_busy(count, used, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 * GIB - used, 80 * GIB))
    with pytest.raises(ValueError, match=message):
        probes.check_gpu(place(0), 8, allow_cpu=False)


def test_models_larger_than_the_gpu(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (79 * GIB, 79 * GIB))
    with pytest.raises(ValueError, match=r"need [0-9.]+ GiB a GPU, it has 79\.0"):
        probes.check_gpu_memory(config, {"student": QWEN2_5["14B"], "teacher": QWEN2_5["72B"]})
    probes.check_gpu_memory(config, {"student": QWEN2_5["1.5B"], "teacher": QWEN2_5["7B"]})


def test_another_stack_than_the_one_that_works_is_named(monkeypatch):
    asked = ["nemo_toolkit[core]==2.7.3", "megatron-core==0.15.3", "numpy<2", "torch>=2.9,<2.14", "pandas"]
    monkeypatch.setattr(probes, "requires", {"nemo-tsdkd": [*asked, 'ruff==0.17.6; extra == "test"']}.__getitem__)
    found = {
        "nemo_toolkit": "2.7.3",
        "megatron-core": "0.15.3",
        "numpy": "1.26.4",
        "torch": "2.10.0a0+b4e4ee81d3.nv25.12",
    }

    def version(package):
        if package not in found:
            raise PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(provenance, "version", version)
    probes.check_versions()
    for package, other in (("megatron-core", "0.16.1"), ("numpy", "2.1.0"), ("torch", "2.8.0")):
        with monkeypatch.context() as patch:
            patch.setitem(found, package, other)
            with pytest.raises(ValueError, match=rf"{package} is {re.escape(other)}, but must be "):
                probes.check_versions()
    monkeypatch.delitem(found, "nemo_toolkit")
    with pytest.raises(ValueError, match=r"nemo_toolkit is absent, but must be ==2\.7\.3"):
        probes.check_versions()


def test_a_package_on_the_path_alone_has_no_requirements_to_check(monkeypatch):
    def requires(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(probes, "requires", requires)
    with pytest.raises(UserError, match="not installed"):
        probes.check_versions()


def test_a_node_that_does_not_see_the_run_folder(tmp_path):
    store = HashStore()
    first, second = (probes.SharedFolder(str(tmp_path / d), place(r), store, wait=0.5) for r, d in enumerate("ab"))
    first.show()
    with pytest.raises(ValueError, match="rank 0's file is not seen"):
        second.show()
    with pytest.raises(ValueError, match="files of right are not seen"):
        first.check_answers(["left", "right"])


def test_the_check_of_the_shared_folder_leaves_nothing_behind(tmp_path):
    store = HashStore()
    first, second = (probes.SharedFolder(str(tmp_path), place(r), store, wait=5) for r in range(2))
    first.show()
    second.show()
    first.check_answers(["left", "right"])
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_node_with_the_same_error_share_a_line():
    findings = [Finding("n1", 0, {}), Finding("n2", 2, {}, ["no GPU"]), Finding("n2", 3, {}, ["no GPU"])]
    assert _grouped(findings) == ["n2 (rank 2, 3): no GPU"]


def test_a_node_with_other_packages_is_named_once():
    findings = [Finding("n1", 0, {"torch": "2.13"}), *(Finding("n2", r, {"torch": "2.9"}) for r in (1, 2))]
    assert _version_differences(findings) == ["n2: torch is 2.9, but 2.13 on n1"]


def test_a_rank_that_never_comes_is_missed_by_its_node_s_name(config):
    errors = Preflight(config, place(0, port=ranks.free_port()), timeout=1, allow_cpu=True).run()
    assert errors == ["right (rank 1): no report within 2 s"]


def test_a_port_in_use_gives_one_line(config, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (error,) = Preflight(config, place(0, port=port), timeout=1, allow_cpu=True).run()
        assert "\n" not in error and f"lost rank 0 at 127.0.0.1:{port}: " in error
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1"), monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
        if torch.distributed.is_initialized():  # by an earlier test's check that hung, and whose thread has gone on
            torch.distributed.destroy_process_group()
        with pytest.raises(HostError, match=f"MASTER_PORT = 127.0.0.1:{port}: the ranks cannot meet"), process_group():
            pass


def test_rank_zero_tells_what_is_wrong_on_another_node(config, monkeypatch):
    port, errors = ranks.free_port(), {}
    checks = [Preflight(config, place(r, port=port), timeout=20, allow_cpu=True) for r in range(2)]
    monkeypatch.setattr(checks[1].finding, "host", "right")
    monkeypatch.setattr(checks[1], "_check_node", lambda: torch.empty(-1))
    threads = [threading.Thread(target=lambda r=r: errors.update({r: checks[r].run()})) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors[0]) == 1 and errors[0][0].startswith("right (rank 1): node: ")
    assert errors[1] == errors[0]


def test_a_check_that_hangs_is_reported_and_the_rank_goes_on(config):
    check = Preflight(config, place(0), timeout=0.2, allow_cpu=True)
    release = threading.Event()
    check._try(release.wait, "all-reduce over all nodes")
    release.set()
    assert check.finding.errors == ["all-reduce over all nodes: hung for 0 s"]

"""An import by several ranks: each holds its share of the model, and the checkpoint is that of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tiny_hf
import tiny_run
import torch
from safetensors import safe_open
from safetensors.torch import load_file

RANKS = 4
COUNTS = {"num_hidden_layers": 16, "num_experts": 16, "num_experts_per_tok": 4}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
LARGE = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 512}


def peak_of_an_import(source: Path, output: Path) -> int:
    """Import on this rank; the most bytes that it had in memory."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    tiny_run.import_hf(source, output)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """By name: the Hugging Face folder, its import by four ranks, and each rank's peak memory."""
    root, made = tmp_path_factory.mktemp("import"), {}
    for name, sizes in (("small", SMALL), ("large", LARGE)):
        source = tiny_hf.save_hf(root / f"{name}_hf", "qwen3_moe", **COUNTS, **sizes)
        peaks = ranks.run_ranks(peak_of_an_import, RANKS, source, root / name, meet=False)
        made[name] = source, root / name, peaks
    return made


def test_a_rank_holds_its_share_of_the_model_and_one_tensor(imported):
    source, _, peaks = imported["large"]
    with safe_open(source / "model.safetensors", framework="pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
    share, without = sum(sizes) / RANKS, max(imported["small"][2])  # what the libraries take, and as many tensors
    assert share > 90 * 2**20
    assert max(peaks) - without <= 1.5 * share + max(sizes), (max(peaks) - without, share)


def test_an_export_of_it_gives_the_source_back(imported, tmp_path):
    source, checkpoint, _ = imported["small"]
    assert not list(checkpoint.parent.glob("*.log"))
    ranks.run_ranks(tiny_run.export, 1, checkpoint, "hf", tmp_path / "back", meet=False)
    before, after = (load_file(at / "model.safetensors") for at in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_one_rank_writes_as_many_tensors(imported, tmp_path):
    """More than the pipe between two processes holds reports of."""
    ranks.run_ranks(tiny_run.import_hf, 1, imported["small"][0], tmp_path / "one", timeout=100, meet=False)

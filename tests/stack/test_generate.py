"""The generate command: what it writes at any layout, and how it goes on after it was cut off."""

import json
import shutil

import pytest
from ranks import run_ranks

from nemo_tsdkd.cli.generate import main


def generate(root, output, world_size, *arguments):
    paths = [f"{name}.path={root / name}" for name in ("student", "teacher")]
    overrides = [*paths, f"run_dir={output}.run", f"data.path={root}/data.jsonl", "rollout.batch_size=8"]
    argv = ["--config-name", "tiny", "--output", str(output), "--shard-size", "10", *overrides, *arguments]
    run_ranks(main, world_size, argv, meet=False)


def responses(output):
    return {p.name: p.read_bytes() for p in output.iterdir() if p.name.startswith("responses")}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The folder of a run that one process wrote in one go."""
    output = tmp_path_factory.mktemp("whole") / "out"
    generate(root, output, 1, "--model", "teacher")
    return output


def test_every_prompt_has_a_response(root, whole):
    files = responses(whole)
    assert sorted(files) == [f"responses-0000{i}.jsonl" for i in range(4)]
    records = [json.loads(line) for name in sorted(files) for line in files[name].splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (root / "data.jsonl").read_text().splitlines()]
    assert [r["index"] for r in records] == list(range(37))
    assert [r["prompt"] for r in records] == prompts
    assert all(0 < len(r["response_ids"]) <= 16 for r in records)
    assert all(len(r["response_ids"]) == 16 for r in records if r["truncated"])
    assert len({r["response"] for r in records}) > 30


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, []),
        (2, ["parallel.tensor_model_parallel_size=2", "parallel.gpus_per_node=2"]),
        (4, ["parallel.pipeline_model_parallel_size=2", "parallel.gpus_per_node=4"]),
    ],
)
def test_a_run_cut_off_is_completed_at_another_layout_to_the_same_responses(root, whole, tmp_path, world_size, layout):
    output = shutil.copytree(whole, tmp_path / "out")
    for name in ("responses-00001.jsonl", "responses-00003.jsonl"):
        (output / name).unlink()
    (output / ".responses-00003.jsonl.7.partial").write_text('{"index": 30, "prom')
    kept = (output / "responses-00000.jsonl").stat().st_mtime_ns
    generate(root, output, world_size, "--model", "teacher", *layout)
    assert responses(output) == responses(whole)
    assert (output / "responses-00000.jsonl").stat().st_mtime_ns == kept


def test_other_settings_are_refused(root, tmp_path):
    generate(root, tmp_path / "out", 1, "--model", "student", "data.limit=3")
    with pytest.raises(AssertionError, match=r"UserError: --output = .* was written with rollout"):
        generate(root, tmp_path / "out", 1, "--model", "student", "data.limit=3", "rollout.temperature=0.5")


def test_ranks_must_be_a_multiple_of_a_model_copy_s(root, tmp_path):
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.gpus_per_node=2"]
    with pytest.raises(AssertionError, match="1 ranks were started: must be a multiple of TP x PP = 2"):
        generate(root, tmp_path / "out", 1, "--model", "student", *layout)

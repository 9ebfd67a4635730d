"""The demo's flow with models too small to learn: Hugging Face in, two steps on two processes, Hugging Face out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_tsdkd.demo import pretrain, run, score, tasks
from nemo_tsdkd.reporting.rows import read_samples


@pytest.mark.timeout(900)  # five imports of NeMo
def test_the_flow_from_hugging_face_to_hugging_face(tmp_path, monkeypatch, capfd):
    recipes = {name: replace(recipe, hidden_size=32, steps=1) for name, recipe in pretrain.RECIPES.items()}
    monkeypatch.setattr(pretrain, "PROBLEMS", 64)
    monkeypatch.setattr(run, "pretrained", lambda cache: pretrain.pretrained(cache, recipes))
    shares = {}

    def accuracy(folder, problems):
        assert problems == tasks.held_out_problems(4)
        score.accuracy(folder, problems)  # no model solves one: a share of its own tells which folder was scored
        return shares.setdefault(folder, (len(shares) + 1) / 4)

    monkeypatch.setattr(run, "accuracy", accuracy)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "left over").touch()
    batches = ["global_batch_size=4", "micro_batch_size=2", "teacher.micro_batch_size=2"]
    two_processes = ["parallel.pipeline_model_parallel_size=1", "parallel.gpus_per_node=2"]  # stack/ has the layouts
    small = ["max_steps=2", *batches, *two_processes, "optim.warmup_steps=0"]
    run.main(["--runs", str(tmp_path), "--problems", "4", *small])
    shown = "".join(capfd.readouterr()).splitlines()
    assert 12 <= len(shown) < 35, shown  # and in a longer run one line of progress a minute
    assert not (tmp_path / "demo" / "left over").exists()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert (summary["steps"], summary["problems"]) == (2, 4)
    assert summary["seconds"].keys() == {"pretraining", "distillation", "export", "scoring"}
    assert summary["in_the_loop"].keys() == {"0", "2"}
    samples = read_samples(tmp_path / "demo" / "train" / "samples.jsonl")
    assert {(s["step"], s["kind"]) for s in samples} == {(0, "validation"), (2, "validation")}
    assert all(s["verdict"]["error"] is None for s in samples)
    (student,), (teacher,) = ((tmp_path / "demo-cache").glob(f"{name}-*") for name in ("student", "teacher"))
    export = Path(summary["export"])
    scored = {"student_before": student, "teacher": teacher, "student_after": export}
    assert {name: summary[name] for name in scored} == {name: shares[folder] for name, folder in scored.items()}
    before, after = weights(student), weights(export)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).state_dict()

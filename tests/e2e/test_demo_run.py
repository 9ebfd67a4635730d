"""The demo's flow with models too small to learn: Hugging Face in, two steps on four processes, Hugging Face out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_tsdkd.demo import pretrain, run


@pytest.mark.timeout(900)  # seven imports of NeMo
def test_the_flow_from_hugging_face_to_hugging_face(tmp_path, monkeypatch):
    recipes = {name: replace(recipe, hidden_size=32, steps=1) for name, recipe in pretrain.RECIPES.items()}
    monkeypatch.setattr(pretrain, "PROBLEMS", 64)
    monkeypatch.setattr(run, "pretrained", lambda cache: pretrain.pretrained(cache, recipes))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "left over").touch()
    batches = ["global_batch_size=4", "micro_batch_size=2", "teacher.micro_batch_size=2"]
    small = ["max_steps=2", *batches, "optim.warmup_steps=0"]
    run.main(["--runs", str(tmp_path), "--problems", "4", *small])
    assert not (tmp_path / "demo" / "left over").exists()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert (summary["steps"], summary["problems"]) == (2, 4)
    assert all(0 <= summary[name] <= 1 for name in ("student_before", "teacher", "student_after"))
    assert summary["seconds"].keys() == {"pretraining", "distillation", "export", "scoring"}
    (student,) = (tmp_path / "demo-cache").glob("student-*")
    before, after = weights(student), weights(Path(summary["export"]))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).state_dict()

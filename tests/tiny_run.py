"""A tiny student and teacher, imported, with data: what a test of the trainer starts from."""

from __future__ import annotations

import json
from pathlib import Path

import ranks
import tiny_hf

from nemo_tsdkd.config.train_config import TrainConfig

STUDENT_VOCAB, TEACHER_VOCAB = 330, 340


def prepare(root: Path, **sizes: int) -> Path:
    """Write `student`, `teacher` (NeMo checkpoints that differ in depth, width, tying and vocabulary), `data.jsonl` and
    `held_out.jsonl` into `root`.

    Args:
        sizes: fields of Hugging Face's config that both models get instead of their own.
    """
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    hf_student = tiny_hf.save_hf(root / "hf_student", tied=True, vocab_size=STUDENT_VOCAB, **small | sizes)
    large = {"num_attention_heads": 8, "num_key_value_heads": 4}
    hf_teacher = tiny_hf.save_hf(root / "hf_teacher", vocab_size=TEACHER_VOCAB, **large | sizes)
    for source, name in ((hf_student, "student"), (hf_teacher, "teacher")):
        ranks.run_ranks(import_hf, 1, source, root / name, meet=False)  # an import builds its own world
    with (root / "data.jsonl").open("w") as file:
        for i in range(37):  # ragged on both sides, and no multiple of any batch
            row: dict = {"prompt": f"Ann has {i} boxes" * (1 + i % 3)}
            if i % 8 in (2, 5, 7):  # nothing was written: such a sequence does not count, wherever it lands
                row |= {"response": "", "response_ids": []}
            else:
                row["response"] = f"{i} * 12 = {i * 12}. " * (1 + i % 4)
            file.write(json.dumps(row) + "\n")
    with (root / "held_out.jsonl").open("w") as file:
        for i in range(7):  # no multiple of any layout, nor of a batch
            file.write(json.dumps({"prompt": f"Bob sells {i} eggs " * (1 + i % 2), "answer": str(i)}) + "\n")
    return root


def validate(config: TrainConfig, root: Path, every_n_steps: int, verifier: str) -> None:
    """Validate on `held_out.jsonl`, at the start and every n steps; two prompts of it, and of each second step, are
    samples."""
    config.validation.path, config.validation.verifier = str(root / "held_out.jsonl"), verifier
    config.validation.every_n_steps, config.validation.max_new_tokens = every_n_steps, 12
    config.samples.every_n_steps = config.samples.count = 2


def import_hf(source: Path, output: Path) -> None:
    from nemo_tsdkd.cli.convert import import_main

    import_main(["--source", str(source), "--output", str(output)])


def export(checkpoint: Path, to: str, output: Path) -> None:
    from nemo_tsdkd.cli.convert import export_main

    export_main(["--checkpoint", str(checkpoint), "--to", to, "--output", str(output)])


def config(root: Path, run_dir: Path, world_size: int, *, lmbda: float = 0.0, **parallel: int | bool) -> TrainConfig:
    """Five fp32 steps of 8 sequences over the models that `prepare` left in `root`."""
    c = TrainConfig(run_dir=str(run_dir), max_steps=5, global_batch_size=8, micro_batch_size=2, progress_bar=False)
    c.student.path, c.teacher.path, c.data.path = str(root / "student"), str(root / "teacher"), str(root / "data.jsonl")
    c.precision.name = c.teacher.precision = "fp32"
    c.data.seq_length, c.rollout.max_new_tokens, c.rollout.lmbda = 96, 16, lmbda
    c.objective.tile_logits = 4 * STUDENT_VOCAB  # several tiles
    c.optim.lr = 1e-3
    c.parallel.gpus_per_node = world_size
    for name, value in parallel.items():
        assert hasattr(c.parallel, name), name
        setattr(c.parallel, name, value)
    return c

"""Where a training step's time goes: rollout, teacher, student; ours against TRL's GKDTrainer on the same models.

    python benchmarks/step.py [--steps 8] [--threads 1] [--json FILE]

TRL's trainer is what the public recipe builds on: Hugging Face's `generate` for every micro-batch, both models' logits
on every rank. Student and teacher have the demo's sizes and random weights, 48 prompts a step, 48 new tokens, fp32,
one process; the learning rate is almost zero, so that responses stay as long as they are. Ours computes the whole
`paper` objective in micro-batches of 12; TRL's generalised JSD alone, once with the same micro-batches and once with
the whole batch as one, its best case. Each runs in a process of its own; medians over the steps after the first two.
`student` is all that is neither rollout nor teacher: forward, loss, backward, optimizer and the trainer itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rollout import run_python

BATCH, MICRO_BATCH, NEW_TOKENS, SEQ_LENGTH = 48, 12, 48, 96
WARM_UP = 2  # steps
LEARNING_RATE = 1e-9
PARTS = ("rollout", "teacher", "student")


def prepare(folder: Path, steps: int) -> None:
    """Write both models as Hugging Face folders, and the prompts of all steps."""
    from transformers import set_seed

    from nemo_tsdkd.demo.pretrain import RECIPES, build_model
    from nemo_tsdkd.demo.run import write_prompts
    from nemo_tsdkd.demo.tasks import build_tokenizer

    set_seed(0)
    tokenizer = build_tokenizer()
    vocab_size = RECIPES["student"].vocab_size  # TRL's loss wants one width
    for name, recipe in RECIPES.items():
        build_model(dataclasses.replace(recipe, vocab_size=vocab_size), tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_prompts(folder / "prompts.jsonl", BATCH * steps)


def ours(folder: Path, steps: int) -> list[dict[str, float]]:
    """One row a step: seconds by part, response tokens."""
    fields = {
        "run_dir": folder / "run",
        "student.path": folder / "student",
        "teacher.path": folder / "teacher",
        "data.path": folder / "prompts.jsonl",
        "global_batch_size": BATCH,
        "micro_batch_size": MICRO_BATCH,
        "teacher.micro_batch_size": MICRO_BATCH,
        "data.seq_length": SEQ_LENGTH,
        "rollout.max_new_tokens": NEW_TOKENS,
        "rollout.batch_size": BATCH,
        "optim.lr": LEARNING_RATE,
        "optim.warmup_steps": 0,
        "max_steps": steps,
        "checkpoint.every_n_steps": steps,
        "parallel.tensor_model_parallel_size": 1,
        "parallel.pipeline_model_parallel_size": 1,
        "parallel.gpus_per_node": 1,
    }
    run_python(
        "-m", "nemo_tsdkd", "train", "--config-name", "demo", *(f"{key}={value}" for key, value in fields.items())
    )
    rows = []
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        whole, rollout, teacher = step["response_tokens"] / step["tokens_per_s"], step["rollout_s"], step["teacher_s"]
        parts = {"rollout": rollout, "teacher": teacher, "student": whole - rollout - teacher}
        rows.append(parts | {"response_tokens": step["response_tokens"]})
    return rows


class Clock:
    """Times the parts of another trainer's steps from outside."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def begin(self) -> None:
        self.rows.append({"rollout": 0.0, "teacher": 0.0, "student": -time.perf_counter(), "response_tokens": 0})

    def end(self) -> None:
        row = self.rows[-1]
        row["student"] += time.perf_counter() - row["rollout"] - row["teacher"]

    def timed(self, part: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            out = function(*args, **kwargs)
            self.rows[-1][part] += time.perf_counter() - start
            return out

        return call


def trl(folder: Path, steps: int, micro_batch_size: int) -> list[dict[str, float]]:
    """As `ours`, by TRL's GKDTrainer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GKDTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    clock = Clock()

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.begin()

        def on_step_end(self, *args, **kwargs):
            clock.end()

    class Timed(GKDTrainer):
        @staticmethod
        def generate_on_policy_outputs(model, inputs, *args):
            tokens, mask, labels = clock.timed("rollout", GKDTrainer.generate_on_policy_outputs)(model, inputs, *args)
            clock.rows[-1]["response_tokens"] += int(mask[:, inputs["prompts"].shape[1] :].sum())
            return tokens, mask, labels

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    teacher.forward = clock.timed("teacher", teacher.forward)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    config = gkd_config(folder, steps, micro_batch_size)
    Timed(
        student, teacher, config, train_dataset=chats(folder), processing_class=tokenizer, callbacks=[Steps()]
    ).train()
    return clock.rows


def gkd_config(folder: Path, steps: int, micro_batch_size: int):
    from trl import GKDConfig

    return GKDConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=BATCH // micro_batch_size,
        learning_rate=LEARNING_RATE,
        lmbda=1.0,
        beta=0.9,
        temperature=1.0,
        max_new_tokens=NEW_TOKENS,
        max_length=SEQ_LENGTH,
        gradient_checkpointing=False,  # its default, True, would also turn the KV cache off
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def chats(folder: Path):
    from datasets import Dataset

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    messages = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}] for row in rows
    ]
    return Dataset.from_dict({"messages": messages})


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each part, their sum, and median response tokens."""
    medians = {key: statistics.median(row[key] for row in rows[WARM_UP:]) for key in rows[0]}
    return medians | {"step": statistics.median(sum(row[part] for part in PARTS) for row in rows[WARM_UP:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--trl", nargs=2, metavar=("FOLDER", "MICRO_BATCH"), help="run TRL in this process; print JSON")
    args = parser.parse_args()
    if args.trl:
        print(json.dumps(trl(Path(args.trl[0]), args.steps, int(args.trl[1]))))
        return
    if args.steps <= WARM_UP:
        parser.error(f"--steps = {args.steps}: must be more than the {WARM_UP} that warm up")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.steps)
        results[f"ours, micro-batches of {MICRO_BATCH}"] = summary(ours(folder, args.steps))
        for size in (MICRO_BATCH, BATCH):
            out = run_python(__file__, "--trl", name, str(size), "--steps", str(args.steps))
            results[f"TRL, micro-batches of {size}"] = summary(json.loads(out.splitlines()[-1]))
    print(f"{BATCH} prompts a step, {args.threads} threads; seconds, medians of {args.steps - WARM_UP} steps")
    print(f"{'':28}" + "".join(f"{column:>10}" for column in (*PARTS, "step", "tokens")))
    first = next(iter(results.values()))
    for name, row in results.items():
        row["times_ours"] = row["step"] / first["step"]
        figures = "".join(f"{row[column]:10.3f}" for column in (*PARTS, "step"))
        print(f"{name:28}{figures}{row['response_tokens']:10.0f}{row['times_ours']:8.2f} x ours")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

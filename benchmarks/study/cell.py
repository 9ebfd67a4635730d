"""One cell: an arm trained with one seed by the production code, exported, and scored by transformers.

The score takes another way than the training: Hugging Face's model and generation read the exported folder, and plain
fp32 formulas over whole vocabularies give entropies and divergences.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.problems import FAMILIES, MAX_NEW_TOKENS, held_out, task_of
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.demo.tasks import Problem, is_solved
from nemo_tsdkd.reporting.accuracy import ACCURACY
from nemo_tsdkd.reporting.rows import read_metrics

SAMPLES = 4  # of each problem, for what a student writes at temperature 1
ROWS = 200  # sequences that are generated or read at once


def train_cell(config: TrainConfig, supervised: bool) -> dict[str, Any]:
    """Train in this process, which must be new; return the curve on the validation split, and what it took."""
    import nemo_tsdkd.megatron.train as module

    if supervised:
        from benchmarks.study.supervised import SupervisedModel

        module.TSDKDModel = SupervisedModel
    start = time.monotonic()
    module.train(config)
    tokens, curve = 0, []
    for row in read_metrics(Path(config.run_dir, "metrics.jsonl")):
        tokens += round(row.get("response_tokens", 0))
        if ACCURACY in row:
            curve.append({"step": row["step"], "response_tokens": tokens, "accuracy": row[ACCURACY]})
    return {"curve": curve, "response_tokens": tokens, "seconds": round(time.monotonic() - start, 1)}


def export_cell(run_dir: Path, output: Path) -> None:
    """Export the run's last model to a Hugging Face folder, in a process of its own."""
    from nemo_tsdkd.cli.convert import export_main

    export_main(["--checkpoint", str(run_dir), "--to", "hf", "--output", str(output)])


@dataclass(frozen=True)
class Written:
    """Sequences of one width that a model wrote: prompts, padded on the left, and its responses."""

    tokens: Tensor  # [n, S]
    attended: Tensor  # [n, S], true where a token is no padding
    prompt_length: int  # padding included
    texts: list[str]
    truncated: list[bool]  # whether a response reached the limit without an end

    @property
    def response_mask(self) -> Tensor:
        """[n, L], true at response tokens, the end of the text among them."""
        return self.attended[:, self.prompt_length :]


def score(folder: Path, teacher: Path | None, each: int) -> dict[str, Any]:
    """What the model of a Hugging Face folder does on the test split, `each` problems of every family.

    Args:
        teacher: the teacher's folder; None: no divergence from it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    problems = held_out("test", each)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    student, reader = (
        AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval() if path else None
        for path in (folder, teacher)
    )
    greedy = [write(student, tokenizer, part, temperature=0) for part in _parts(problems)]
    correct = _correct(greedy, problems)
    asked = [problem for problem in problems[: len(problems) // SAMPLES] for _ in range(SAMPLES)]
    torch.manual_seed(0)
    sampled = [write(student, tokenizer, part, temperature=1) for part in _parts(asked)]
    right, texts = _correct(sampled, asked), [text for part in sampled for text in part.texts]
    groups = [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]
    lengths = torch.cat([part.response_mask.sum(1) for part in greedy]).double()
    return {
        "accuracy": _mean(correct),
        "accuracy_by_family": {
            task: _mean([c for c, problem in zip(correct, problems, strict=True) if task_of(problem) == task])
            for task in FAMILIES
        },
        "correct": "".join("01"[c] for c in correct),
        "response_length": lengths.mean().item(),
        "truncated": _mean([flag for part in greedy for flag in part.truncated]),
        "sampled_accuracy": _mean(right),
        "distinct": _mean([len(set(group)) / SAMPLES for group in groups]),
        **divergences(student, reader, sampled),
    }


def divergences(student: Any, teacher: Any | None, written: Sequence[Written]) -> dict[str, float | None]:
    """Means over the response tokens that the student wrote, in nats: its entropy, KL(teacher||student) and
    KL(student||teacher)."""
    sums, count = dict.fromkeys(("student_entropy", "forward_kl", "reverse_kl"), 0.0), 0
    for part in written:
        mask = part.response_mask
        log_s = _log_probabilities(student, part)[mask].double()
        count += len(log_s)
        sums["student_entropy"] -= (log_s.exp() * log_s).sum().item()
        if teacher is not None:
            log_t = _log_probabilities(teacher, part)[mask].double()
            width = min(log_s.shape[-1], log_t.shape[-1])  # both have more columns than the tokenizer, and unlike many
            log_s, log_t = log_s[:, :width], log_t[:, :width]
            sums["forward_kl"] += (log_t.exp() * (log_t - log_s)).sum().item()
            sums["reverse_kl"] += (log_s.exp() * (log_s - log_t)).sum().item()
    return {name: total / count if teacher or name == "student_entropy" else None for name, total in sums.items()}


@torch.inference_mode()
def _log_probabilities(model: Any, part: Written) -> Tensor:
    """[n, L, V] of each response token."""
    logits = model(part.tokens, attention_mask=part.attended.long()).logits[:, part.prompt_length - 1 : -1]
    return logits.log_softmax(-1)


def _parts(problems: Sequence[Problem]) -> list[Sequence[Problem]]:
    return [problems[i : i + ROWS] for i in range(0, len(problems), ROWS)]


def _correct(written: Sequence[Written], problems: Sequence[Problem]) -> list[bool]:
    """reasoning-gym's verdicts on the text after the last `Answer:`."""
    texts = [text for part in written for text in part.texts]
    return [is_solved(problem, text) for problem, text in zip(problems, texts, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write(model: Any, tokenizer: Any, problems: Sequence[Problem], temperature: float) -> Written:
    """The model's responses to at most ROWS problems."""
    chats = [[{"role": "user", "content": problem["question"]}] for problem in problems]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    rule = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode():
        tokens = model.generate(**inputs, **rule, max_new_tokens=MAX_NEW_TOKENS)
    prompt_length = inputs["input_ids"].shape[1]
    ended = (tokens[:, prompt_length:] == tokenizer.eos_token_id).long()
    before_end = ended.cumsum(1) - ended == 0
    attended = torch.cat([inputs["attention_mask"].bool(), before_end], 1)
    texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    truncated = (ended.sum(1) == 0).tolist()
    return Written(tokens, attended, prompt_length, texts, truncated)


def digest(folder: Path) -> str:
    """Of the weights of a Hugging Face folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]

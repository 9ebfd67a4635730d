"""Accuracy of a Hugging Face folder: transformers generates, reasoning-gym verifies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_tsdkd.demo.tasks import Problem, is_solved

MAX_NEW_TOKENS = 64


def accuracy(folder: Path, problems: Sequence[Problem]) -> float:
    """Share (0..1) of the problems that the model in `folder` solves with greedy decoding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    chats = [[{"role": "user", "content": problem["question"]}] for problem in problems]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    responses = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(is_solved, problems, responses)) / len(problems)

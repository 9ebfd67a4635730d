"""The demo's problems: chains of sums from reasoning-gym, their written-out steps, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import reasoning_gym
from reasoning_gym.factory import get_score_answer_fn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_tsdkd.config.validation import UserError

TASK = "chain_sum"
SETTINGS = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
HELD_OUT = 400
# reasoning-gym draws problem i of a data set from seed + i: seeds lie further apart than any data set is long.
HELD_OUT_SEED, PRETRAIN_SEED, DISTIL_SEED = 0, 10_000_000, 20_000_000
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Problem = dict[str, Any]  # reasoning-gym's entry: question, answer, metadata


def held_out_problems(count: int = HELD_OUT) -> list[Problem]:
    """Different problems that no training set holds."""
    drawn = {problem["question"]: problem for problem in _draw(2 * HELD_OUT, HELD_OUT_SEED)}
    if not 0 < count <= HELD_OUT:
        raise UserError(f"--problems = {count}: must lie in [1, {HELD_OUT}], those kept out of training.")
    return list(drawn.values())[:count]


def training_problems(count: int, seed: int) -> list[Problem]:
    """Problems drawn from `seed` on, none of them held out; some come twice, as there are only 4,000 of three terms."""
    held_out = {problem["question"] for problem in held_out_problems()}
    return [problem for problem in _draw(2 * count, seed) if problem["question"] not in held_out][:count]


def _draw(count: int, seed: int) -> list[Problem]:
    return list(reasoning_gym.create_dataset(TASK, seed=seed, size=count, **SETTINGS))


def written_steps(problem: Problem) -> str:
    """One line for each operation, then the answer."""
    first, *rest = problem["metadata"]["expression"].split()
    total, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{total} {operator} {term} = {result}")
        total = result
    return "\n".join([*lines, f"Answer: {total}"])


def estimate(problem: Problem) -> str:
    """An answer without a step, to the nearest multiple of five: right by luck in one case of five."""
    return f"Answer: {5 * round(int(problem['answer']) / 5)}"


def is_solved(problem: Problem, response: str) -> bool:
    """Whether reasoning-gym's verifier accepts the text after the response's last `Answer:`."""
    _, found, answer = response.rpartition("Answer:")
    task = problem["metadata"]["source_dataset"]
    return bool(found) and get_score_answer_fn(task)(answer.strip(), problem) == 1.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer, trained on a sample of its task."""
    sample = training_problems(500, PRETRAIN_SEED)
    return train_tokenizer((problem["question"], written_steps(problem)) for problem in sample)


def train_tokenizer(solved: Iterable[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits and a ChatML template, trained on questions with solutions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?[^\s\d]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = (f"user\n{question}\nassistant\n{solution}" for question, solution in solved)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # Qwen2 knows no token types
    )

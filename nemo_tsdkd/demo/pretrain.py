"""The demo's two Hugging Face models, trained from nothing by transformers' Trainer and cached between runs."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from nemo_tsdkd.checkpoints.atomic import atomic_folder
from nemo_tsdkd.demo import tasks
from nemo_tsdkd.distributed.progress import ProgressDisplay

BATCH_SIZE = 64
PROBLEMS = 20_000
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model's size and training. As in Qwen2.5, `vocab_size` exceeds the tokenizer and differs in the pair.

    `written_share` of the problems come with written-out steps, the others with an estimate. Where it `anneals`, the
    learning rate falls to zero at the last step; else the training stops in its midst.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool
    steps: int
    written_share: float = 1.0
    anneals: bool = True


RECIPES = {
    "teacher": Recipe(
        hidden_size=128, num_hidden_layers=4, vocab_size=120, tie_word_embeddings=False, written_share=1.0, steps=500
    ),
    # It has seen solutions written out, but more estimates: left to itself it prefers to guess.
    "student": Recipe(
        hidden_size=96, num_hidden_layers=2, vocab_size=112, tie_word_embeddings=True, written_share=0.4, steps=600
    ),
}


def pretrained(cache: Path, recipes: Mapping[str, Recipe] = RECIPES) -> dict[str, Path]:
    """Name -> Hugging Face folder of each recipe's model, trained here unless `cache` holds it.

    The key covers this code, the recipe and the versions of the libraries.
    """
    folders = {}
    for name, recipe in recipes.items():
        folders[name] = cache / f"{name}-{_key(recipe)}"
        if not folders[name].is_dir():
            with atomic_folder(folders[name]) as folder:
                train(recipe, tasks.training_problems(PROBLEMS, tasks.PRETRAIN_SEED), folder)
    return folders


def _key(recipe: Recipe) -> str:
    digest = hashlib.sha256(repr((recipe, BATCH_SIZE, PROBLEMS, SEED)).encode())
    for module in (tasks.__file__, __file__):
        digest.update(Path(module).read_bytes())
    for package in ("torch", "transformers", "tokenizers", "reasoning-gym"):
        digest.update(metadata.version(package).encode())
    return digest.hexdigest()[:16]


def train(recipe: Recipe, problems: Sequence[tasks.Problem], folder: Path) -> None:
    """Train one model on the demo's problems, the first `written_share` of them with written-out steps."""
    written = round(recipe.written_share * len(problems))
    solutions = [*map(tasks.written_steps, problems[:written]), *map(tasks.estimate, problems[written:])]
    fit(recipe, tasks.build_tokenizer(), [problem["question"] for problem in problems], solutions, folder)


def fit(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], solutions: Sequence[str], folder: Path
) -> None:
    """Train one model on questions and their solutions; save it with its tokenizer as a user would."""
    set_seed(SEED)
    assert len(tokenizer) <= recipe.vocab_size
    model = build_model(recipe, tokenizer)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written there: save_strategy
        max_steps=recipe.steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-3,
        adam_beta2=0.98,
        warmup_ratio=0.1,
        lr_scheduler_type="cosine" if recipe.anneals else "constant_with_warmup",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,  # the same models everywhere, GPU or none
        seed=SEED,
    )
    examples = _examples(tokenizer, questions, solutions)
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.remove_callback(PrinterCallback)  # a line every logging_steps, in a form of its own
    with ProgressDisplay("pretraining step", recipe.steps, only_long=True) as display:
        trainer.add_callback(_Show(display))
        trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Show(TrainerCallback):
    """Shows each logged loss on a display."""

    def __init__(self, display: ProgressDisplay) -> None:
        self.display = display

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.display.show(state.global_step, f"loss {logs['loss']:.4f}")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 model, its heads and widths divisible by 2 for TP 2."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=recipe.vocab_size,
        tie_word_embeddings=recipe.tie_word_embeddings,
        max_position_embeddings=256,
        **ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def _examples(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], solutions: Sequence[str]
) -> list[dict[str, list[int]]]:
    """Chats; only the response counts in the loss."""
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions], add_generation_prompt=True
    )
    responses = tokenizer([solution + tokenizer.eos_token for solution in solutions])["input_ids"]
    return [
        {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        for prompt, response in zip(prompts, responses, strict=True)
    ]

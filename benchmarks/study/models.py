"""The study's pair of models and the teacher's responses: made once, cached, the same for all arms."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from benchmarks.study import problems
from nemo_tsdkd.checkpoints.atomic import atomic_folder
from nemo_tsdkd.demo import pretrain, tasks
from nemo_tsdkd.demo.pretrain import Recipe

# The student saw a sixth of the teacher's problems, a seventh as often, and is a fifth of its size. Both learn from right
# solutions alone. As in Qwen2.5, the widths exceed the tokenizer's 529 tokens and differ.
RECIPES = {
    "teacher": (Recipe(hidden_size=128, num_hidden_layers=4, vocab_size=560, tie_word_embeddings=False, steps=1400), 12_000),
    "student": (Recipe(hidden_size=96, num_hidden_layers=2, vocab_size=536, tie_word_embeddings=True, steps=400), 2_000),
}


def pretrained(cache: Path, recipes: dict[str, tuple[Recipe, int]] = RECIPES) -> dict[str, Path]:
    """Name -> Hugging Face folder; trained here unless `cache` holds it."""
    folders = {}
    for name, (recipe, each) in recipes.items():
        folders[name] = cache / f"{name}-{key(recipe, each)}"
        if not folders[name].is_dir():
            known = problems.training("pretrain", each)
            questions = [problem["question"] for problem in known]
            with atomic_folder(folders[name]) as folder:
                pretrain.fit(recipe, problems.build_tokenizer(), questions, [*map(problems.solution, known)], folder)
    return folders


def key(*of: object) -> str:
    """Of what a cached folder depends on: these values, the code that makes it, the libraries' versions."""
    digest = hashlib.sha256(repr(of).encode())
    for module in (problems, pretrain, tasks):
        digest.update(Path(module.__file__).read_bytes())
    for package in ("torch", "transformers", "tokenizers", "reasoning-gym"):
        digest.update(metadata.version(package).encode())
    return digest.hexdigest()[:16]

"""What all arms share: the pair of models, the teacher's responses, the validation split. Made once and kept."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import ranks

from benchmarks.study import problems
from benchmarks.study.cell import digest
from benchmarks.study.problems import MAX_NEW_TOKENS
from benchmarks.study.settings import Setting
from nemo_tsdkd.checkpoints.atomic import atomic_folder
from nemo_tsdkd.demo import pretrain, tasks

NAMES = ("student", "teacher")
CONF = Path(__file__).parent / "conf"


@dataclass(frozen=True)
class Pair:
    """Folders and files that every cell reads, and the digests of both models' weights."""

    hf: dict[str, Path]  # by "student" and "teacher"
    nemo: dict[str, Path]
    responses: Path  # of the teacher to the training prompts, sampled at temperature 1
    validation: Path
    digests: dict[str, str]


def pretrained(setting: Setting, folder: Path) -> dict[str, Path]:
    """By "student" and "teacher", Hugging Face folders of both models; trained side by side unless `folder` has them.
    Call it before the fork server imports Megatron's stand-in for a GPU, which changes torch."""
    hours = 3600.0 * 3
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda name: ranks.run_ranks(_pretrained, 1, setting, name, folder, timeout=hours)[0], NAMES)
        return dict(zip(NAMES, made, strict=True))


def prepare(setting: Setting, folder: Path, hf: dict[str, Path]) -> Pair:
    """Import both models and let the teacher write, unless `folder` holds the result."""
    nemo = {}
    for name, source in hf.items():
        nemo[name] = source.with_name(f"{source.name}-nemo")
        if not nemo[name].exists():
            ranks.run_ranks(_import, 1, source, nemo[name], meet=False)
    made = folder / f"data-{_key(setting.distil_each, setting.validation_each, digest(hf['teacher']))}"
    made.mkdir(parents=True, exist_ok=True)
    prompts = problems.write_rows(made / "prompts.jsonl", problems.training("distil", setting.distil_each))
    held_out = problems.held_out("validation", setting.validation_each)
    validation = problems.write_rows(made / "validation.jsonl", held_out)
    # An unfinished folder is continued; a finished one takes a second.
    ranks.run_ranks(_generate, 1, prompts, nemo, made / "responses", meet=False)
    return Pair(hf, nemo, made / "responses", validation, {name: digest(source) for name, source in hf.items()})


def _pretrained(setting: Setting, name: str, cache: Path) -> Path:
    recipe, each = setting.recipes[name], setting.pretrain_each[name]
    folder = cache / f"{name}-{_key(recipe, each)}"
    if not folder.is_dir():
        known = problems.training("pretrain", each)
        questions, solutions = [problem["question"] for problem in known], [*map(problems.solution, known)]
        with atomic_folder(folder) as partial:
            pretrain.fit(recipe, problems.build_tokenizer(), questions, solutions, partial)
    return folder


def _key(*of: object) -> str:
    """Of what a kept folder depends on: these values, the code that makes it, the libraries' versions."""
    key = hashlib.sha256(repr(of).encode())
    for module in (problems, pretrain, tasks):
        key.update(Path(str(module.__file__)).read_bytes())
    for package in ("torch", "transformers", "tokenizers", "reasoning-gym"):
        key.update(metadata.version(package).encode())
    return key.hexdigest()[:16]


def _import(source: Path, output: Path) -> None:
    from nemo_tsdkd.cli.convert import import_main

    import_main(["--source", str(source), "--output", str(output)])


def _generate(prompts: Path, nemo: dict[str, Path], output: Path) -> None:
    from nemo_tsdkd.cli.generate import main

    paths = [f"{name}.path={path}" for name, path in nemo.items()]
    given = [*paths, f"data.path={prompts}", f"rollout.max_new_tokens={MAX_NEW_TOKENS}", "run_dir=unused"]
    main(["--config-name", "study", "--config-dir", str(CONF), "--model", "teacher", "--output", str(output), *given])

"""README, docs/, CONTRIBUTING and the job scripts name only what exists; README's example runs."""

import dataclasses
import re
from pathlib import Path

import pytest
import recipes
import torch

from nemo_tsdkd.config.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "docker/Dockerfile")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for folder in ("slurm", "docker") for path in (ROOT / folder).glob("*.sh")),
]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
WRITTEN = {
    "config.yaml",
    "docker/compiled.txt",
    "cache/",
    "imported/",
    "models/",
    "runs/benchmarks/",
    "attempts/",
}  # by a run, a job or a build
FILE = re.compile(r"(?<![\w/.$>{}-])(?:[\w.-]+/)*[\w.-]*\w\.(?:py|md|sh|ya?ml|toml|txt|in)\b(?![/\w])")
FOLDER = re.compile(r"(?<=`)(?:[a-z_]+/)+(?=`)")
FIELD = re.compile(r"(?<![\w./])([a-z]+)\.([a-z]\w*)\b(?![/(.])")
SECTIONS = {
    f.name: f.default_factory for f in dataclasses.fields(TrainConfig) if f.default_factory is not dataclasses.MISSING
}


def text_of(path):
    """A page without addresses on the web."""
    return re.sub(r"https?://\S+|nvcr\.io\S+", "", path.read_text())


def exists(name, page):
    """Whether a file of this name lies where a reader would look for it: the root, the package, beside the page; a bare
    name anywhere."""
    places = [ROOT / name, ROOT / "nemo_tsdkd" / name, page.parent / name]
    trees = ("nemo_tsdkd", "tests", "docs", "conf", "slurm")
    return any(place.exists() for place in places) or (
        "/" not in name and any(path for tree in trees for path in (ROOT / tree).rglob(name))
    )


def missing_files(page):
    created = {block["path"] for blocks in recipes.sections().values() for block in blocks if block["path"]}
    named = set(FILE.findall(text_of(page))) | set(FOLDER.findall(text_of(page)))
    return sorted(
        name
        for name in named - created - WRITTEN
        if not re.search(r"[A-Z]{4,}\.", name) and not exists(name, page)  # NAME.yaml stands for any
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name):
    assert missing_files(ROOT / name) == []


def test_the_search_for_files_finds_those_that_do_not_exist(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`docs/math.md`, [x](docs/none.md), `objective/none.py: f`, objective/terms.py, test_docs.py, test_none.py, "
        "`checks/`, `rooms/`, conf/NAME.yaml, https://x.org/none.py"
    )
    assert missing_files(page) == ["docs/none.md", "objective/none.py", "rooms/", "test_none.py"]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".md", ".sh")) and name != "CHANGELOG.md"])
def test_every_configuration_field_that_is_named_exists(name):
    recipes_fields = {"adam_eps"}
    unknown = [
        f"{section}.{field}"
        for section, field in FIELD.findall(text_of(ROOT / name))
        if section in SECTIONS
        and field not in {f.name for f in dataclasses.fields(SECTIONS[section])} | recipes_fields
        and field not in ("py", "md", "json", "jsonl")  # files
    ]
    assert unknown == []


def test_what_docs_math_places_stands_there():
    """In the table of equations: `file.py: name`, and the tests."""
    page = (ROOT / "docs" / "math.md").read_text()
    places = re.findall(r"`([\w/]+\.py): ([\w.*]+)`((?:, `\w+`)*)", page)
    assert len(places) > 10
    for file, name, more in places:
        (path,) = [p for p in (ROOT / "nemo_tsdkd" / file, *(ROOT / "tests").rglob(file)) if p.is_file()]
        for one in [*name.split("."), *re.findall(r"\w+", more)]:
            defined = re.search(rf"(?:def|class) {one.replace('*', '')}", path.read_text())
            assert defined or any(f"def {one}" in p.read_text() for p in path.parent.glob("*.py")), f"{file}: {one}"


def test_readme_s_tree_is_the_tree():
    tree = re.search(r"```\n(conf/ .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    top, found = "", set()
    for indent, name in re.findall(r"^( *)([\w./]+/) ", tree, re.MULTILINE):
        top = top if indent else name
        found.add(name if not indent else top + name)
    tracked = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")} - {"runs", "build", "dist"}
    package = {f"nemo_tsdkd/{p.name}/" for p in (ROOT / "nemo_tsdkd").iterdir() if (p / "__init__.py").is_file()}
    assert found == {f"{name}/" for name in tracked if not name.endswith(".egg-info")} | package


def test_readme_s_first_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 15
    space: dict = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), space)  # our own text
    out, grad, mask = space["out"], space["student_logits"].grad, space["response_mask"]
    assert re.fullmatch(
        r"loss \d\.\d{3}: direct \d\.\d{3}, indirect \d+\.\d{3}, entropy \d\.\d{3}\n", capsys.readouterr().out
    )
    assert float(out.num_sequences) == 4 and bool((grad[mask] != 0).any()) and not bool(grad[~mask].any())

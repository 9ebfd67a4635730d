"""What pyproject.toml promises: a wheel that works alone, one place for each version, a job that CI can run."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_hf
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nemo_tsdkd

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Files that install or name packages; none of them may state a version again.
PROSE = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", ".ci/run", ".pre-commit-config.yaml")),
    *(path for folder in ("docs", "docker", "slurm", ".github", "tests/slurm") for path in (ROOT / folder).rglob("*")),
]


def rows(lines):
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def direct():
    """{name: its requirement} of all that pyproject.toml asks for, extras included."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = {}
    for requirement in (row for group in groups for row in rows(group)):
        name = canonicalize_name(requirement.name)
        assert found.setdefault(name, requirement).specifier == requirement.specifier, f"{name} is asked for twice"
    return found


def is_exact(requirement):
    return any(part.operator == "==" for part in requirement.specifier)


def constraints():
    return rows((ROOT / "constraints-cpu.txt").read_text().splitlines())


def test_each_direct_dependency_has_one_exact_release_on_a_cpu_machine():
    """In pyproject.toml where no other works, else in constraints-cpu.txt and within pyproject.toml's range."""
    asked, pinned = direct(), {}
    for row in constraints():
        name = canonicalize_name(row.name)
        assert is_exact(row) and name not in pinned, f"constraints-cpu.txt: {row}"
        pinned[name] = next(iter(row.specifier)).version
    exact = {name for name, requirement in asked.items() if is_exact(requirement)}
    gpu = {canonicalize_name(row.name) for row in rows(PROJECT["optional-dependencies"]["gpu"])}
    assert exact & pinned.keys() == set(), "a release stands in two places"
    assert asked.keys() - exact - gpu == pinned.keys(), "a row for each direct dependency, and for nothing else"
    assert [f"{n}=={v}" for n, v in pinned.items() if not asked[n].specifier.contains(v)] == []


def stated(text, names):
    """Versions that a text states for these packages, as pip reads them."""
    found = re.findall(r"([A-Za-z0-9][\w.-]*)(?:\[[\w,]*\])?\s*(?:==|~=|>=|<=|!=|<|>)\s*v?\d", text)
    return [name for name in found if canonicalize_name(name) in names]


def test_no_other_file_states_a_version():
    names = direct().keys()
    assert {
        str(path.relative_to(ROOT)): found for path in PROSE if path.is_file() and (found := versions(path, names))
    } == {}


def versions(path, names):
    return stated(path.read_text(errors="replace"), names)


def test_the_search_for_versions_finds_them():
    text = 'pip install torch==2.13.0 "numpy<2" lm_eval[hf]>=0.4 beta == 0'
    assert stated(text, {"torch", "numpy", "lm-eval"}) == ["torch", "numpy", "lm_eval"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the wheel of the tracked files, installed by itself. No network: setuptools comes with torch."""
    source, built, target = (tmp_path_factory.mktemp(name) for name in ("source", "built", "target"))
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", ".", *alone, "--no-build-isolation", "-w", built], cwd=source, check=True)
    subprocess.run([*pip, "install", *alone, "--target", target, *built.glob("*.whl")], check=True)
    return target


def test_a_wheel_finds_its_configurations_from_anywhere(wheel, tmp_path):
    tiny_hf.save_hf(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text('{"prompt": "Ann has 3 boxes"}\n')
    places = ["run_dir=run", "student.path=model", "teacher.path=model", "data.path=d.jsonl"]
    places += ["data.seq_length=96", "rollout.max_new_tokens=16"]  # the tiny model's positions
    code = "import sys, nemo_tsdkd.cli.main as m; print('#', m.__file__); m.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "check", "--config-name", "train", "objective=gkd", *places]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"# {wheel}/nemo_tsdkd/cli/main.py\n" in run.stdout  # not the checkout's
    assert "  preset: gkd\n" in run.stdout and "# valid for 1 ranks" in run.stdout


def test_a_wheel_holds_all_configurations_and_no_test(wheel):
    def names(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}

    assert names(wheel / "nemo_tsdkd" / "conf") == names(ROOT / "conf")
    templates = Path("nemo_tsdkd", "reporting", "templates")
    assert {p.name for p in (wheel / templates).iterdir()} == {p.name for p in (ROOT / templates).iterdir()}
    assert {path.name for path in wheel.iterdir()} == {
        "nemo_tsdkd",
        "bin",
        f"nemo_tsdkd-{nemo_tsdkd.__version__}.dist-info",
    }


def test_a_wheel_states_licence_version_and_types(wheel):
    (metadata,) = wheel.glob("*.dist-info")
    text = (metadata / "METADATA").read_text()
    assert "\nLicense-Expression: Apache-2.0\n" in text and f"\nVersion: {nemo_tsdkd.__version__}\n" in text
    assert (metadata / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (wheel / "nemo_tsdkd" / "py.typed").is_file()


def test_the_changelog_starts_with_this_version():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == nemo_tsdkd.__version__


def test_the_workflow_runs_what_ci_runs():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run" and (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_pre_commit_runs_the_installed_ruff():
    """From .venv, so that its version stands in pyproject.toml alone."""
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert [(hook["language"], hook["entry"]) for hook in hooks] == [
        ("system", ".venv/bin/ruff check --force-exclude"),
        ("system", ".venv/bin/ruff format --check --force-exclude"),
    ]


@pytest.fixture(scope="module")
def stack():
    spec = importlib.util.spec_from_file_location("stack", ROOT / "docker" / "stack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_image_s_check_passes_this_machine_but_for_transformer_engine(stack):
    (line,) = stack.check()
    assert line.startswith("nemo-tsdkd needs transformer-engine") and line.endswith("which is not installed")


def test_the_image_s_check_follows_requirements_and_names_what_does_not_hold(stack, monkeypatch):
    asked = {
        "ours": ["torch>=2.9", 'tool==1; extra == "test"', 'never; python_version < "3"', "nemo[core]"],
        "nemo": ["numpy<2", 'absent; extra == "core"'],
    }
    found = {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "nemo": "1", "tool": "1", "numpy": "2.1"}

    def version(package):
        if package not in found:
            raise stack.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(stack, "requires", asked.get)
    monkeypatch.setattr(stack, "version", version)
    assert stack.violations("ours", frozenset({"test"})) == [
        "nemo needs numpy<2, but 2.1 is installed",
        'nemo needs absent; extra == "core", which is not installed',
    ]
    found["tool"] = "2"
    assert stack.violations("ours", frozenset({"test"}), alone=True) == [
        'ours needs tool==1; extra == "test", but 2 is installed'
    ]
    assert stack.violations("ours", frozenset(), alone=True) == []


def test_the_image_keeps_what_was_compiled_for_it(stack):
    assert f"torch=={torch.__version__}" in stack.compiled() and "numpy" not in "".join(stack.compiled())

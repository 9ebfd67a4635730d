"""House rules that a parser can check: imports point one way, the stack stays in adapters, nothing is evaluated."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_tsdkd"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}
SOURCES = [*MODULES.values(), *sorted((ROOT / "benchmarks").rglob("*.py"))]

# Lower layers know nothing of higher ones; whatever is not named here is an adapter between layers 2 and 4.
LAYERS = {"validation": 0, "config": 0, "vocab_parallel": 1, "objective": 2, "cli": 4, "__main__": 5}
# Besides nemo_tsdkd/megatron/: the files that stand between our step and the stack.
ADAPTERS = {"model", "teacher", "checkpoint", "cpu"}
STACK = {"megatron", "nemo", "lightning", "transformer_engine"}
WITHOUT_TORCH = (
    "cli",
    "compose",
    "check",
    "config",
    "convert",
    "folders",
    "launch",
    "memory",
    "precision",
    "validation",
)


def imports(source: str) -> set[str]:
    """Absolute names of all modules a file imports, wherever in it; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def upward(module: str, source: str) -> list[str]:
    """Imports of `module` that point from a lower layer to a higher one."""
    own = LAYERS.get(part(module), 3)
    ours = sorted(name for name in imports(source) if name.startswith("nemo_tsdkd.") and part(name) != "__version__")
    return [name for name in ours if LAYERS.get(part(name), 3) > own]


def dangers(source: str) -> list[str]:
    """Calls that run what a file or a string says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            name in {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("shell") == "True"
            or keywords.get("trust_remote_code") == "True"
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    assert upward(module, MODULES[module].read_text()) == []


def test_the_stack_is_imported_by_adapters_only():
    users = [m for m, path in MODULES.items() if {name.split(".")[0] for name in imports(path.read_text())} & STACK]
    assert [m for m in users if part(m) not in {*ADAPTERS, "megatron"}] == []


@pytest.mark.parametrize("module", sorted(ADAPTERS - {"cpu"}))
def test_the_stand_in_comes_before_the_stack(module):
    """Megatron compiles at import, and looks for a GPU: too late for cpu.py afterwards."""
    names = [ast.unparse(n) for n in ast.parse((PACKAGE / f"{module}.py").read_text()).body]
    stand_in = names.index("import nemo_tsdkd.megatron")
    assert all(name.split()[1].split(".")[0] not in STACK for name in names[:stand_in])
    assert any(name.split()[1].split(".")[0] in STACK for name in names[stand_in:] if " " in name)


def test_no_two_modules_import_each_other():
    graph = {module: imports(path.read_text()) & MODULES.keys() for module, path in MODULES.items()}
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}, "a cycle"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_or_string_is_run(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("eval('1')", "ast.literal_eval('1')"),
        ("pickle.load(f)", "pickle.dump(x, f)"),
        ("torch.load(p)", "torch.load(p, weights_only=True)"),
        ("torch.load(p, weights_only=False)", "torch.load(p, map_location='cpu', weights_only=True)"),
        ("subprocess.run('ls', shell=True)", "subprocess.run(['ls'])"),
        ("AutoTokenizer.from_pretrained(p, trust_remote_code=True)", "AutoTokenizer.from_pretrained(p)"),
        ("yaml.load(f)", "yaml.safe_load(f)"),
    ],
)
def test_the_search_for_dangers_finds_them(bad, good):
    assert dangers(f"def f():\n    return {bad}") == [f"line 2: {ast.unparse(ast.parse(bad))}"]
    assert dangers(good) == []


def test_the_search_for_upward_imports_finds_them():
    assert upward("nemo_tsdkd.config", "def f():\n    from nemo_tsdkd import data") == ["nemo_tsdkd.data"]
    assert upward("nemo_tsdkd.objective.loss", "from nemo_tsdkd.model import TSDKDModel") == [
        "nemo_tsdkd.model",
        "nemo_tsdkd.model.TSDKDModel",
    ]
    assert upward("nemo_tsdkd.model", "import nemo_tsdkd.cli") == ["nemo_tsdkd.cli"]
    assert upward("nemo_tsdkd.model", "from nemo_tsdkd.objective import tsdkd_loss") == []


def test_login_node_modules_import_no_torch():
    code = f"import sys, {', '.join(f'nemo_tsdkd.{m}' for m in WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

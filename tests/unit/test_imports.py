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

# Folders in rows: a module imports from its own folder and from the rows above, never from beside or below.
ROWS = (
    ("config",),
    ("distributed",),
    ("objective", "rollout", "checkpoints", "verifiers"),
    ("data", "reporting"),
    ("checks",),
    ("plan",),
    ("megatron",),
    ("cli",),
    ("demo",),
)
ROW = {folder: row for row, folders in enumerate(ROWS) for folder in folders}
AT_THE_ROOT = {"__init__": set(), "__main__": {"cli"}, "model": {"megatron"}}  # and the folders that each may import
STACK = {"megatron", "nemo", "lightning", "transformer_engine", "apex"}
WITHOUT_TORCH = [
    module
    for module in MODULES
    if module.split(".")[1:2] in (["config"], ["checkpoints"], ["checks"], ["cli"], ["plan"], ["verifiers"])
    or module in ("nemo_tsdkd.distributed.launch", "nemo_tsdkd.data.source")
    or module in ("nemo_tsdkd.reporting.provenance", "nemo_tsdkd.reporting.rows", "nemo_tsdkd.reporting.report")
]


def imports(source: str) -> set[str]:
    """Absolute names of all modules a file imports, wherever in it; `from a import b` counts as a and a.b."""
    modules, inside = imported(source)
    return modules | inside


def imported(source: str) -> tuple[set[str], set[str]]:
    """Absolute names that a file imports, wherever in it: the modules, and `a.b` for each `from a import b`."""
    modules, inside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules.add(node.module)
            inside |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules, inside


def folder_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def forbidden(module: str, source: str) -> list[str]:
    """The package's modules that `module` imports although they are not above its own folder."""
    own = folder_of(module)
    ours = sorted(name for name in imports(source) if name.startswith("nemo_tsdkd."))
    if own in AT_THE_ROOT:
        return [name for name in ours if folder_of(name) not in AT_THE_ROOT[own]]
    return [name for name in ours if folder_of(name) != own and ROW.get(folder_of(name), len(ROWS)) >= ROW[own]]


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
    assert forbidden(module, MODULES[module].read_text()) == []


def absent(source: str) -> list[str]:
    """Modules of the package that a file imports and that do not exist."""
    modules, _ = imported(source)
    return sorted(name for name in modules if name.split(".")[0] == "nemo_tsdkd" and name not in MODULES)


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_what_is_imported_exists(path):
    """Imports inside of functions too, which only a run of that function would find missing."""
    assert absent(path.read_text()) == []
    assert absent("def f():\n    from nemo_tsdkd.megatron.nowhere import x") == ["nemo_tsdkd.megatron.nowhere"]


def test_every_module_lies_in_a_folder_with_a_row():
    assert {folder_of(module) for module in MODULES} == {*ROW, *AT_THE_ROOT}
    assert {path.name for path in PACKAGE.glob("*.py")} == {f"{name}.py" for name in AT_THE_ROOT}


def test_the_stack_is_imported_in_one_folder():
    users = {m for m, path in MODULES.items() if {name.split(".")[0] for name in imports(path.read_text())} & STACK}
    assert {folder_of(module) for module in users} == {"megatron"}


def test_the_stand_in_comes_before_the_stack():
    """Megatron compiles at import, and looks for a GPU: too late for cpu.py afterwards. Python runs the package first,
    whichever of its modules is asked for."""
    body = [ast.unparse(n) for n in ast.parse((PACKAGE / "megatron" / "__init__.py").read_text()).body]
    before = body[: body.index("cpu.install()")]
    assert not {name.split(".")[0] for name in imports("\n".join(before))} & STACK
    inside = [
        n for n in ast.parse((PACKAGE / "megatron" / "cpu.py").read_text()).body if not isinstance(n, ast.FunctionDef)
    ]
    assert not {name.split(".")[0] for name in imports("\n".join(map(ast.unparse, inside)))} & STACK


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


def test_the_search_for_forbidden_imports_finds_them():
    assert forbidden("nemo_tsdkd.config.schema", "def f():\n    import nemo_tsdkd.data.dataset") == [
        "nemo_tsdkd.data.dataset"
    ]
    assert forbidden("nemo_tsdkd.objective.loss", "from nemo_tsdkd import model") == ["nemo_tsdkd.model"]
    assert forbidden("nemo_tsdkd.objective.loss", "import nemo_tsdkd.rollout.sampling") == [
        "nemo_tsdkd.rollout.sampling"
    ]
    assert forbidden("nemo_tsdkd.megatron.model", "import nemo_tsdkd.cli.main") == ["nemo_tsdkd.cli.main"]
    assert forbidden("nemo_tsdkd.megatron.model", "import nemo_tsdkd.objective.loss, nemo_tsdkd.megatron.gpt") == []
    assert forbidden("nemo_tsdkd.model", "import nemo_tsdkd.config.schema") == ["nemo_tsdkd.config.schema"]


def test_login_node_modules_import_no_torch():
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Our precision names become the Transformer Engine recipes a user expects, through Megatron's own dispatch.

Transformer Engine does not install without CUDA, and half-installed it breaks Megatron's import. Its recipe classes
need only pydantic, so they are loaded by path out of the released wheel (0.7 MB, kept in .cache/).
"""

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_tsdkd.checks import precision

TE_VERSION = "2.11.0"  # the newest that the `gpu` extra allows
CACHE = Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="module")
def te_recipe():
    """The module transformer_engine.common.recipe."""
    wheel = CACHE / f"transformer_engine-{TE_VERSION}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        got = subprocess.run([*command, f"--dest={CACHE}", f"transformer-engine=={TE_VERSION}"], capture_output=True)
        if got.returncode:
            assert "CI" not in os.environ, got.stderr.decode()
            pytest.skip(f"Transformer Engine's wheel cannot be downloaded: {got.stderr.decode()[-200:]}")
    source = CACHE / f"te_recipe_{TE_VERSION}.py"
    source.write_bytes(zipfile.ZipFile(wheel).read("transformer_engine/common/recipe/__init__.py"))
    spec = importlib.util.spec_from_file_location("te_recipe", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["te_recipe"] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["te_recipe"]


@pytest.fixture(scope="module")
def megatron_recipe(te_recipe):
    """Megatron's get_fp8_recipe, which it defines only where Transformer Engine imports, over the true classes."""
    folder = next(iter(importlib.util.find_spec("megatron").submodule_search_locations))
    tree = ast.parse(Path(folder, "core/fp8_utils.py").read_text())
    defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "get_fp8_recipe"]
    function = next(n for n in defined if len(n.body) > 2)  # the other definition returns None
    function.args.args[0].annotation = None
    recipes = SimpleNamespace(**{n: n for n in ("delayed", "tensorwise", "mxfp8", "blockwise")})
    scope = {
        "transformer_engine": SimpleNamespace(common=SimpleNamespace(recipe=te_recipe)),
        "is_te_min_version": lambda version: True,
        "Fp8Recipe": recipes,
        "TEDelayedScaling": lambda **_: pytest.fail("delayed scaling"),
    }
    exec(compile(ast.Module([function], []), "fp8_utils", "exec"), scope)
    return lambda name: scope["get_fp8_recipe"](
        SimpleNamespace(**precision.model_settings(name), fp8_dot_product_attention=False, fp8_wgrad=True)
    )


def test_tensorwise_is_current_scaling_with_wide_gradients(te_recipe, megatron_recipe):
    recipe = megatron_recipe("fp8_tensorwise")
    assert type(recipe).__name__ == "Float8CurrentScaling"
    assert recipe.float8_current_scaling() and not recipe.delayed()
    assert (recipe.fp8_format.value.max_fwd, recipe.fp8_format.value.max_bwd) == (448, 57344)  # e4m3, e5m2
    assert not recipe.fp8_dpa and not recipe.fp8_mha  # attention stays bf16


def test_blockwise_is_e4m3_both_ways_in_blocks(te_recipe, megatron_recipe):
    recipe = megatron_recipe("fp8_blockwise")
    assert type(recipe).__name__ == "Float8BlockScaling"
    assert recipe.float8_block_scaling() and not recipe.delayed()
    assert (recipe.fp8_format.value.max_fwd, recipe.fp8_format.value.max_bwd) == (448, 448)
    assert (recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim) == (1, 2, 1)


def test_bf16_never_reaches_a_recipe(megatron_recipe):
    with pytest.raises(ValueError, match="only supported FP8 formats"):
        megatron_recipe("bf16")


@pytest.mark.parametrize("name", precision.NAMES)
def test_every_setting_is_one_that_nemo_and_megatron_know(name):
    """A misspelt field would be dropped in silence by NeMo's config override."""
    nemo, megatron = (Path(importlib.util.find_spec(p).submodule_search_locations[0]) for p in ("nemo", "megatron"))
    fields = _annotated(megatron / "core/transformer/transformer_config.py", "TransformerConfig")
    fields |= _annotated(megatron / "core/model_parallel_config.py", "ModelParallelConfig")
    assert precision.model_settings(name).keys() <= fields

    plugin = _class(nemo / "lightning/pytorch/plugins/mixed_precision.py", "MegatronMixedPrecision")
    init = next(n for n in plugin.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    assert precision.plugin_settings(name).keys() <= {a.arg for a in init.args.args}


def _class(path: Path, name: str) -> ast.ClassDef:
    return next(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef) and n.name == name)


def _annotated(path: Path, name: str) -> set[str]:
    return {n.target.id for n in _class(path, name).body if isinstance(n, ast.AnnAssign)}

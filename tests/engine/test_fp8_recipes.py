"""Our precision names become the recipes a user expects, through Megatron's own dispatch."""

import dataclasses
import inspect

import pytest
import ranks

from nemo_tsdkd.checks import precision


def recipes() -> dict[str, dict]:
    """By precision: the class of Megatron's recipe and what decides its arithmetic."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer import TransformerConfig

    facts = {}
    for name in precision.FP8:
        config = TransformerConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4, **precision.model_settings(name)
        )
        recipe = get_fp8_recipe(config)
        dimensions = ("x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim")
        facts[name] = {
            "class": type(recipe).__name__,
            "delayed": recipe.delayed(),
            "largest": (recipe.fp8_format.value.max_fwd, recipe.fp8_format.value.max_bwd),
            "attention": recipe.fp8_dpa or recipe.fp8_mha,
            "dimensions": [getattr(recipe, d) for d in dimensions if hasattr(recipe, d)],
        }
    return facts


def test_names_are_current_scaling_with_wide_gradients_and_blocks_in_e4m3():
    facts = ranks.run_ranks(recipes, 1)[0]
    both = {"delayed": False, "attention": False}  # attention stays 16-bit
    current = {"class": "Float8CurrentScaling", "largest": (448, 57344), "dimensions": []}
    blocks = {"class": "Float8BlockScaling", "largest": (448, 448), "dimensions": [1, 2, 1]}
    assert facts == {"fp8_tensorwise": both | current, "fp8_blockwise": both | blocks}


def unknown_settings(name: str) -> tuple[set[str], set[str]]:
    """Fields that Megatron's config does not have, and arguments that NeMo's plugin does not take."""
    from megatron.core.transformer import TransformerConfig
    from nemo.lightning import MegatronMixedPrecision

    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    taken = inspect.signature(MegatronMixedPrecision.__init__).parameters.keys()
    return precision.model_settings(name).keys() - fields, precision.plugin_settings(name).keys() - taken


@pytest.mark.parametrize("name", precision.NAMES)
def test_every_setting_is_one_that_nemo_and_megatron_know(name):
    """A misspelt field would be dropped in silence by NeMo's config override."""
    assert ranks.run_ranks(unknown_settings, 1, name) == [(set(), set())]

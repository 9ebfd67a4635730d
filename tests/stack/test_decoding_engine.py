"""Stand-ins for Transformer Engine's linear layers while decoding, against the same formula; TE itself: test_gpu.py."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

from nemo_tsdkd.megatron.rollout import decoding


def engine_layer(use_bias: bool, te_return_bias: bool, group=None) -> nn.Module:
    """Parameters under the names that Transformer Engine's modules give them."""
    g = torch.Generator().manual_seed(3)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(6, 4, generator=g, dtype=torch.float64))
    layer.bias = nn.Parameter(torch.randn(6 if use_bias else 0, generator=g, dtype=torch.float64))
    layer.layer_norm_weight = nn.Parameter(torch.randn(4, generator=g, dtype=torch.float64))
    layer.use_bias, layer.te_return_bias, layer.eps, layer.tp_group = use_bias, te_return_bias, 1e-3, group
    return layer


X = torch.linspace(-2, 3, 3 * 2 * 4, dtype=torch.float64).view(3, 2, 4)
# Megatron sets te_return_bias only where there is a bias.
BIASES = [(False, False), (True, False), (True, True)]


@torch.no_grad()
def check(layer: nn.Module, result, product) -> None:
    out, later = result
    if layer.te_return_bias:
        assert later is layer.bias
    else:
        assert later is None
        product = product + layer.bias if layer.use_bias else product
    torch.testing.assert_close(out, product, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("use_bias", "te_return_bias"), BIASES)
def test_column_parallel_with_and_without_a_norm(use_bias, te_return_bias):
    layer = engine_layer(use_bias, te_return_bias)
    check(layer, decoding._column_parallel(layer, X), X @ layer.weight.T)
    normed = X / (X.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.layer_norm_weight
    check(layer, decoding._norm_column_parallel(layer, X), normed @ layer.weight.T)


def row_parallel() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for use_bias, te_return_bias in BIASES:
        layer = engine_layer(use_bias, te_return_bias, dist.group.WORLD)
        whole = X @ layer.weight.T
        layer.weight = nn.Parameter(layer.weight.chunk(size, dim=1)[rank].contiguous())
        with torch.no_grad():
            check(layer, decoding._row_parallel(layer, X.chunk(size, dim=-1)[rank].contiguous()), whole)


def test_row_parallel_sums_over_the_ranks_and_adds_the_bias_once():
    ranks.run_ranks(row_parallel, 2)

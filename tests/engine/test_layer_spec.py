"""Transformer Engine's layers compute what Megatron's own do, in fp32, on every layout: logits and gradients."""

from pathlib import Path

import pytest
import ranks
import torch
from megatron_chunk import build
from plain_model import plain_name, plain_twin

LAYOUTS = {"tp1": (1, 1, False), "tp2": (2, 1, False), "tp2_sp": (2, 1, True), "pp2": (1, 2, False)}
TOLERANCE = 2e-6  # of the norm: fp32 carries 7 digits through 4 layers


def output_and_gradients(model) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """This rank's logits of two micro-batches (on the last stage) and its gradients of a fixed linear function of them,
    by Megatron's own schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    logits = []
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 300, (2, 2, 32), generator=generator)

    def forward_step(batches, model):
        batch = next(batches)
        out = model(batch, torch.arange(batch.shape[1])[None].expand_as(batch), None)

        def loss(logits_of_batch):
            logits.append(logits_of_batch.detach())
            weights = torch.randn(logits_of_batch.shape, generator=torch.Generator().manual_seed(9))
            return (logits_of_batch * weights).sum(), {}

        return out, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(tokens),
        model=model,
        num_microbatches=2,
        seq_length=tokens.shape[2],
        micro_batch_size=tokens.shape[1],
        forward_only=False,
    )
    return torch.stack(logits) if logits else None, {name: p.grad for name, p in model.named_parameters()}


def differences(checkpoint: Path, tp: int, pp: int, sequence_parallel: bool) -> dict[str, float]:
    """Relative errors of this rank's logits and gradients, by name."""
    model = build(checkpoint, tp, pp, sequence_parallel=sequence_parallel, gradient_accumulation_fusion=False)
    kinds = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("megatron.core.extensions")}
    assert kinds >= {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}, kinds
    assert model.config.apply_rope_fusion and model.config.bias_activation_fusion  # as on a GPU
    twin = plain_twin(model)
    logits, gradients = output_and_gradients(model)
    expected_logits, expected = output_and_gradients(twin)
    errors = {} if logits is None else {"logits": relative(logits, expected_logits)}
    return errors | {name: relative(gradient, expected[plain_name(name)]) for name, gradient in gradients.items()}


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.shape == expected.shape and expected.norm() > 0
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_logits_and_gradients_equal_those_of_megatrons_own_layers(layout, root):
    tp, pp, sequence_parallel = LAYOUTS[layout]
    errors = ranks.run_ranks(differences, tp * pp, root / "teacher", tp, pp, sequence_parallel)
    assert "logits" in errors[-1] and all(len(e) >= 2 * 7 for e in errors)  # two layers or more on each rank
    worst = max((error, name) for of_rank in errors for name, error in of_rank.items())
    assert worst[0] < TOLERANCE, worst

"""Context parallelism of whole models, over Transformer Engine's ring and all-to-all attention.

Transformer Engine takes only 16 bits here: a comparison is to bf16's rounding, whose order of sums the layout changes.
"""

from pathlib import Path

import pytest
import ranks
import tiny_run
import torch
from megatron_chunk import build
from torch import distributed as dist
from training_runs import CP, SP, TP, compare, run

from nemo_tsdkd.checks import precision

LENGTH = 64
TOLERANCE = 1.5e-2  # of the norm: a few roundings to bf16 (2^-9 each) through four layers, and of the parts of a sum


def logits_and_gradients(checkpoint: Path, cp: int, tp: int, kind: str | None) -> tuple[torch.Tensor, dict]:
    """Logits [2, S / CP, V / TP] of this rank's places, and the gradients of a function of all places, summed over
    context-parallel ranks as DDP sums them."""
    from megatron.core import parallel_state

    from nemo_tsdkd.megatron.gpt import context_parallel_slice

    settings = precision.model_settings("bf16") | {"cp_comm_type": kind, "gradient_accumulation_fusion": False}
    model = build(checkpoint, tp=tp, cp=cp, **settings)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 300, (2, LENGTH), generator=generator)
    places = torch.arange(LENGTH)[None].expand_as(tokens)
    slices = context_parallel_slice({"tokens": tokens, "places": places})
    logits = model(slices["tokens"], slices["places"], None).float()
    # One weight for each place and column of the whole, so that a wrong place shows.
    weights = torch.randn(2, LENGTH, 1024, generator=generator)
    first = dist.get_rank() % tp * logits.shape[-1]
    mine = weights.gather(1, slices["places"][..., None].expand(-1, -1, 1024))[..., first : first + logits.shape[-1]]
    (logits * mine).sum().backward()
    group = parallel_state.get_context_parallel_group()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def whole(parts: list[torch.Tensor], cp: int, tp: int) -> torch.Tensor:
    """Logits of all places from those of the ranks: each holds chunks r and 2 CP - 1 - r; TP is the inner dimension."""
    chunks = [None] * (2 * cp)
    for r in range(cp):
        columns = torch.cat(parts[r * tp : (r + 1) * tp], dim=-1)
        chunks[r], chunks[2 * cp - 1 - r] = columns.chunk(2, dim=1)
    return torch.cat(chunks, dim=1)


@pytest.fixture(scope="module")
def alone(root):
    return {tp: ranks.run_ranks(logits_and_gradients, tp, root / "teacher", 1, tp, None) for tp in (1, 2)}


@pytest.mark.parametrize(
    ("cp", "tp", "kind"), [(2, 1, "p2p"), (2, 1, "a2a"), (2, 1, "all_gather"), (2, 2, "p2p"), (2, 2, None)]
)
def test_logits_and_gradients_equal_those_without(cp, tp, kind, root, alone):
    split = ranks.run_ranks(logits_and_gradients, cp * tp, root / "teacher", cp, tp, kind)
    expected = whole([logits for logits, _ in alone[tp]], 1, tp)
    logits = whole([logits for logits, _ in split], cp, tp)
    assert (logits - expected).norm() < TOLERANCE * expected.norm()
    for rank, (_, gradients) in enumerate(split):
        for name, gradient in alone[tp][rank % tp][1].items():
            assert (gradients[name] - gradient).norm() < 2 * TOLERANCE * gradient.norm(), name


LAYOUTS = {  # ranks, the student's layout, the teacher's where it has one of its own
    "1": (1, {}, {}),
    "cp2": (2, {CP: 2}, {}),
    "cp2_tp2_sp": (4, {CP: 2, TP: 2, SP: True}, {}),
    "teacher_cp2": (2, {}, {CP: 2}),  # the student at DP 2
}


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_a_run_s_metrics_and_weights_equal_those_without(layout, root, tmp_path):
    outcomes = {}
    for name in ("1", layout):
        world_size, parallel, teacher = LAYOUTS[name]
        config = tiny_run.config(root, tmp_path / name, world_size, **parallel)
        for field, value in teacher.items():
            setattr(config.teacher.parallel, field, value)
        config.max_steps, config.data.seq_length = 3, 128
        config.precision.name = config.teacher.precision = "bf16"
        config.objective.gate_rule = "importance_weight"  # sums up along whole sequences
        outcomes[name] = run(config)[0]
    # Choices (openers, most uncertain tokens, the teacher's order) may tip at near-ties of bf16's entropies.
    # Adam's first steps are as long for a gradient near its rounding as for any other: hence the width of the last.
    compare(outcomes[layout], outcomes["1"], metrics=0.02, tipping=0.15, updates=0.6)

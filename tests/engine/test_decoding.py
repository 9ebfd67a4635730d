"""Decoding with Transformer Engine's layers writes what decoding with Megatron's own does; FP8 changes no response."""

from pathlib import Path

import pytest
import ranks
import tiny_run
import torch
from megatron_chunk import build
from plain_model import plain_twin

from nemo_tsdkd.checks import precision

RULES = [{"temperature": 0.0}, {"temperature": 1.5}, {"temperature": 1.5, "top_p": 0.8}]


def responses(model, rules: dict) -> list[list[int]]:
    from megatron.core import parallel_state

    from nemo_tsdkd.config.schema import RolloutConfig
    from nemo_tsdkd.data.tokenizer import Vocabulary
    from nemo_tsdkd.megatron.rollout.generation import generate

    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 300, (n,), generator=generator).tolist() for n in (5, 11, 3, 17, 8)]
    written = generate(
        model,
        prompts,
        rollout_config=RolloutConfig(max_new_tokens=16, batch_size=3, **rules),
        sample_ids=list(range(len(prompts))),
        seed=1,
        step=0,
        vocabulary=Vocabulary(tiny_run.STUDENT_VOCAB, 0, tuple(range(40, 60))),
        max_length=64,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return [response.token_ids for response in written]


def both(checkpoint: Path, tp: int, pp: int, sequence_parallel: bool) -> list[tuple]:
    """By rule: responses of the model, and of the same model of Megatron's own layers."""
    model = build(checkpoint, tp, pp, sequence_parallel=sequence_parallel)
    twin = plain_twin(model)
    return [(responses(model, rules), responses(twin, rules)) for rules in RULES]


@pytest.mark.parametrize(
    ("tp", "pp", "sequence_parallel"), [(1, 1, False), (2, 1, True), (1, 2, False)], ids=["tp1", "tp2_sp", "pp2"]
)
def test_it_writes_what_megatrons_own_layers_do(tp, pp, sequence_parallel, root):
    for name in ("student", "teacher"):
        for of_rank in ranks.run_ranks(both, tp * pp, root / name, tp, pp, sequence_parallel):
            for ours, theirs in of_rank:
                assert ours == theirs
            assert len({str(ours) for ours, _ in of_rank}) == len(RULES)


def under_fp8(checkpoint: Path) -> tuple:
    """Responses of a model in bf16 and FP8, and what of FP8 decoding used and put back."""
    import spy

    written = []
    for name in ("bf16", *precision.FP8):
        model = build(checkpoint, **precision.model_settings(name, False)).eval()
        before = str(model.config)
        with spy.quantizations() as calls:
            written.append([responses(model, rules) for rules in RULES])
        assert not calls and str(model.config) == before
        tokens = torch.arange(64)[None]
        with spy.quantizations() as calls, torch.no_grad():
            model(tokens, tokens, None)
        assert bool(calls) == (name in precision.FP8), "the training pass after it is FP8 again"
    return tuple(written)


def test_rollouts_are_16_bit_under_fp8(root):
    bf16, *fp8 = ranks.run_ranks(under_fp8, 1, root / "teacher")[0]
    assert fp8 == [bf16] * len(precision.FP8)

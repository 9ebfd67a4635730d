"""Rollouts of a Megatron model at every layout against Hugging Face's generate on the same weights."""

import functools

import pytest
from ranks import run_ranks

VOCAB, PADDED, EOS = 119, 128, 7
PROMPT_LENGTHS = [5, 11, 3, 17, 8, 2, 13, 6, 9, 4]


def _prompts():
    import torch

    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def _generate(tp, pp, runs, tied=False, sequence_parallel=False):
    """One list of (token_ids, truncated) per entry of `runs`, keyword arguments of `generate` and its config."""
    import hf_megatron
    import torch

    from nemo_tsdkd.config import RolloutConfig
    from nemo_tsdkd.megatron.generation import generate

    tp_group, pp_group = hf_megatron.initialize_layout(tp, pp)
    model = hf_megatron.megatron_stage(
        hf_megatron.qwen2(tie_word_embeddings=tied), PADDED, sequence_parallel=sequence_parallel
    ).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    results = []
    for run in runs:
        order = run.get("order", list(range(len(PROMPT_LENGTHS))))
        prompts = _prompts()
        config = RolloutConfig(**{"max_new_tokens": 24, "temperature": 0.0, "batch_size": 4, **run.get("config", {})})
        responses = generate(
            model,
            [prompts[i] for i in order],
            config=config,
            sample_ids=order,
            seed=run.get("seed", 1),
            step=run.get("step", 5),
            eos_ids=run.get("eos_ids", {EOS}),
            vocab_size=VOCAB,
            max_length=run.get("max_length", 64),
            tp_group=tp_group,
            pp_group=pp_group,
        )
        by_prompt = dict(zip(order, responses, strict=True))
        results.append([(by_prompt[i].token_ids, by_prompt[i].truncated) for i in range(len(order))])
    assert model.training and model.config.sequence_parallel == sequence_parallel
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return results


def _hf_greedy(tied):
    import hf_megatron
    import torch

    model = hf_megatron.qwen2(tie_word_embeddings=tied)
    responses = []
    for prompt in _prompts():
        x = torch.tensor([prompt])
        out = model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=24, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
        tokens = out[0, len(prompt) :].tolist()
        responses.append((tokens, tokens[-1] != EOS))
    return responses


@functools.cache
def hf_greedy(tied=False):
    return run_ranks(_hf_greedy, 1, tied)[0]


SAMPLED = {"config": {"temperature": 1.3}}
RUNS = [
    {},
    SAMPLED,
    {"config": {"temperature": 1.3, "top_k": 9}},
    {"config": {"temperature": 1.3, "top_p": 0.8}},
]


@functools.cache
def one_process():
    return run_ranks(_generate, 1, 1, 1, RUNS)[0]


LAYOUTS = [(1, 1, False), (2, 1, False), (1, 2, False), (2, 2, False), (2, 1, True), (2, 2, True)]


@pytest.mark.parametrize(("tp", "pp", "sequence_parallel"), LAYOUTS)
def test_greedy_equals_hugging_face_and_sampling_one_process_at_every_layout(tp, pp, sequence_parallel):
    ranks = run_ranks(_generate, tp * pp, tp, pp, RUNS, False, sequence_parallel)
    assert all(result == ranks[0] for result in ranks)
    assert ranks[0][0] == hf_greedy()
    assert ranks[0] == one_process()


def test_the_comparison_sees_both_endings_and_four_different_rules():
    greedy, *sampled = one_process()
    assert {truncated for _, truncated in greedy + sampled[0]} == {True, False}
    assert all(a != b for i, a in enumerate(one_process()) for b in one_process()[:i])


@pytest.mark.parametrize("tp", [1, 2])
def test_tied_embeddings(tp):
    assert run_ranks(_generate, tp, tp, 1, [{}], True)[0][0] == hf_greedy(tied=True)


def test_tied_embeddings_across_the_pipeline():
    assert run_ranks(_generate, 2, 1, 2, [{}], True)[0][0] == hf_greedy(tied=True)

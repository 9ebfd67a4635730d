"""Rollouts of a Megatron model at every layout against Hugging Face's generate on the same weights."""

from pathlib import Path

import pytest
import tiny_hf
import tiny_run
import torch
from megatron_chunk import build
from ranks import run_ranks

PROMPT_LENGTHS = [5, 11, 3, 17, 8, 2, 13, 6, 9, 4]
EOS = list(range(40, 60))  # many, so that some responses end and some do not
NEW_TOKENS = 24
HOT = {"temperature": 1.5}
RULES = [{"temperature": 0.0}, HOT, {**HOT, "top_k": 9}, {**HOT, "top_p": 0.8}]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def state_of(model) -> dict[str, object]:
    """What decoding must put back: every module's mode and own attributes, its config, and the weights."""
    state: dict[str, object] = {name: p.clone() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        flags = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) or k == "forward"}
        state[f"{name}."] = (flags, list(module._modules))
    return {**state, "config": str(model.config)}


def rollouts(checkpoint: Path, tp: int, pp: int, sequence_parallel: bool, runs: list[dict]) -> list[list[tuple]]:
    """On this rank: (token_ids, truncated) of every prompt, for every run (`rules` of its config, other arguments)."""
    from megatron.core import parallel_state

    from nemo_tsdkd.checkpoints.shape import padded_vocab_size
    from nemo_tsdkd.config.schema import RolloutConfig
    from nemo_tsdkd.data.tokenizer import Vocabulary
    from nemo_tsdkd.megatron.checkpoints.load import gpt_config
    from nemo_tsdkd.megatron.rollout.generation import generate

    vocab_size = gpt_config(checkpoint).vocab_size
    padded = padded_vocab_size(vocab_size, tensor_model_parallel_size=tp)
    model = build(checkpoint, tp, pp, vocab_size=padded, sequence_parallel=sequence_parallel)
    before = state_of(model)
    results = []
    for run in runs:
        order = run.get("order", list(range(len(PROMPT_LENGTHS))))
        responses = generate(
            model,
            [prompts()[i] for i in order],
            rollout_config=RolloutConfig(**{"max_new_tokens": NEW_TOKENS, "batch_size": 4, **run["rules"]}),
            sample_ids=order,
            seed=run.get("seed", 1),
            step=run.get("step", 5),
            vocabulary=Vocabulary(vocab_size, 0, tuple(EOS)),
            max_length=run.get("max_length", 64),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
        )
        by_prompt = dict(zip(order, responses, strict=True))
        results.append([(by_prompt[i].token_ids, by_prompt[i].truncated) for i in sorted(order)])
    after = state_of(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name
    return results


def hf_greedy(folder: Path) -> list[tuple]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    responses = []
    for prompt in prompts():
        x = torch.tensor([prompt])
        mask = torch.ones_like(x)
        rule = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
        tokens = model.generate(x, attention_mask=mask, **rule)[0, len(prompt) :].tolist()
        responses.append((tokens, tokens[-1] not in EOS))
    return responses


@pytest.fixture(scope="module")
def alone(root):
    """The student's rollouts in one process."""
    return run_ranks(rollouts, 1, root / "student", 1, 1, False, [{"rules": rules} for rules in RULES])[0]


def test_the_comparison_sees_both_endings_and_four_different_rules(alone):
    assert {truncated for _, truncated in alone[0] + alone[1]} == {True, False}
    assert all(a != b for i, a in enumerate(alone) for b in alone[:i])
    for tokens, truncated in (response for run in alone for response in run):
        assert not set(tokens[:-1]) & set(EOS), "nothing comes after the first EOS"
        assert truncated == (tokens[-1] not in EOS) and (not truncated or len(tokens) == NEW_TOKENS)
        assert max(tokens) < tiny_run.STUDENT_VOCAB, "a padding column was drawn"


def test_greedy_equals_hugging_face(root, alone):
    assert alone[0] == run_ranks(hf_greedy, 1, root / "hf_student")[0]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_sequence_parallelism_is_off_while_decoding(root, alone, tp, pp):
    """The layouts without it: test_decode_step.py."""
    runs = [{"rules": rules} for rules in RULES]
    ranks = run_ranks(rollouts, tp * pp, root / "student", tp, pp, True, runs)
    assert ranks == [alone] * (tp * pp)


def test_the_teacher_too(root):
    ranks = run_ranks(rollouts, 4, root / "teacher", 2, 2, False, [{"rules": RULES[0]}])
    assert ranks[0][0] == run_ranks(hf_greedy, 1, root / "hf_teacher")[0]


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_other_families(tmp_path, model_type):
    source = tiny_hf.save_hf(tmp_path / "hf", model_type, num_hidden_layers=2)
    run_ranks(tiny_run.import_hf, 1, source, tmp_path / "nemo", meet=False)
    ranks = run_ranks(rollouts, 2, tmp_path / "nemo", 2, 1, False, [{"rules": RULES[0]}])
    assert ranks[0][0] == run_ranks(hf_greedy, 1, source)[0]


def test_a_response_depends_on_seed_step_and_prompt_only(root, alone):
    order = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]
    same = [{"rules": {**HOT, "batch_size": 1}}, {"rules": {**HOT, "batch_size": 64}}, {"rules": HOT, "order": order}]
    other = [{"rules": HOT, "seed": 2}, {"rules": HOT, "step": 6}]
    results = run_ranks(rollouts, 1, root / "student", 1, 1, False, same + other)[0]
    assert results[:3] == [alone[1]] * 3
    for result in results[3:]:
        assert sum(a != b for a, b in zip(result, alone[1], strict=True)) >= 8


def test_prompt_and_response_end_at_max_length(root, alone):
    short, tiny = run_ranks(
        rollouts,
        1,
        root / "student",
        1,
        1,
        False,
        [{"rules": HOT, "max_length": 20}, {"rules": {**HOT, "max_new_tokens": 1}}],
    )[0]
    for length, got, full in zip(PROMPT_LENGTHS, short, alone[1], strict=True):
        limit = min(NEW_TOKENS, 20 - length)
        assert got == (full[0][:limit], full[1] or len(full[0]) > limit)
    assert [tokens for tokens, _ in tiny] == [tokens[:1] for tokens, _ in alone[1]]


def _refused(checkpoint: Path) -> str:
    from nemo_tsdkd.megatron.rollout.decoding import check_model

    model = build(checkpoint)
    check_model(model)
    model.config.window_size = (128, 0)
    with pytest.raises(ValueError) as refusal:
        check_model(model)
    return str(refusal.value)


def test_a_model_that_would_decode_wrongly_is_refused(root):
    assert "window_size = (128, 0)" in run_ranks(_refused, 1, root / "student")[0]

"""Continuous batching without a model: a scripted one says what each sequence would write."""

import random

import pytest

from nemo_tsdkd.rollout.schedule import PREFILL_TOKENS, Response, Schedule

EOS = 0


def play(prompts, scripts, **limits):
    """Run a schedule against `scripts`; check every pass against a cache kept in plain lists. Returns the passes."""
    schedule = Schedule(prompts, **{"eos_ids": {EOS}, "max_length": 1000, **limits})
    rows: dict[int, list[int]] = {}  # what each cache row holds
    passes = []
    while not schedule.finished:
        batch = schedule.next_pass()
        passes.append(batch)
        for offset, (sequence, tokens) in enumerate(zip(batch.sequences, batch.token_ids, strict=True)):
            row = batch.first_row + offset
            rows[row] = list(tokens) if batch.prefill else rows[row] + tokens
            history = prompts[sequence] + scripts[sequence][: len(schedule.written[sequence])]
            assert rows[row] == history, "a row must hold its sequence up to the token fed last"
            assert batch.positions[offset] == len(history) - 1 < schedule.cache_length
        assert batch.first_row + len(batch.sequences) <= limits["batch_size"]
        sampled = [scripts[i][len(schedule.written[i])] for i in batch.sequences]
        for source, target in schedule.record(batch, sampled):
            rows[target] = list(rows[source])
    return schedule.responses(), passes


def scripts_of(lengths):
    """Response i: tokens of its own, then EOS at `lengths[i]`."""
    return [[1000 * i + j + 1 for j in range(n - 1)] + [EOS] + [9] * 50 for i, n in enumerate(lengths)]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
def test_every_row_follows_its_sequence_and_every_response_comes_back_in_order(batch_size):
    rng = random.Random(batch_size)
    prompts = [[rng.randrange(1, 99) for _ in range(rng.randint(1, 12))] for _ in range(40)]
    lengths = [rng.randint(1, 20) for _ in prompts]
    scripts = scripts_of(lengths)
    responses, _ = play(prompts, scripts, batch_size=batch_size, max_new_tokens=15)
    for length, script, response in zip(lengths, scripts, responses, strict=True):
        assert response == Response(script[: min(length, 15)], truncated=length > 15)


def test_the_first_eos_belongs_to_the_response_even_at_the_limit():
    responses, _ = play([[5]] * 3, scripts_of([3, 4, 1]), batch_size=4, max_new_tokens=3)
    assert [(r.token_ids[-1] == EOS, r.truncated) for r in responses] == [(True, False), (False, True), (True, False)]


def test_prompt_and_response_fit_into_max_length():
    prompts = [[1] * 4, [1] * 9]
    responses, _ = play(prompts, scripts_of([30, 30]), batch_size=2, max_new_tokens=8, max_length=10)
    assert [len(r.token_ids) for r in responses] == [6, 1]
    assert all(r.truncated for r in responses)


def test_rows_are_refilled_together_and_never_idle_while_prompts_wait():
    prompts, lengths = [[1]] * 64, [1 + i % 16 for i in range(64)]
    _, passes = play(prompts, scripts_of(lengths), batch_size=16, max_new_tokens=50)
    prefills = [p for p in passes if p.prefill]
    assert sum(len(p.sequences) for p in prefills) == 64
    assert all(len(p.sequences) >= 2 for p in prefills)
    decoded = [len(p.sequences) for p in passes if not p.prefill]
    waiting_ends = max(i for i, p in enumerate(passes) if p.prefill)
    assert min(len(p.sequences) for p in passes[:waiting_ends] if not p.prefill) > 16 - 2 - 2
    assert len(decoded) < sum(max(lengths[i : i + 16]) for i in range(0, 64, 16))  # fixed batches of 16 need more


def test_a_prefill_is_bounded():
    prompts = [[1] * (PREFILL_TOKENS // 3)] * 7
    _, passes = play(prompts, scripts_of([2] * 7), batch_size=7, max_new_tokens=4, max_length=PREFILL_TOKENS)
    assert max(len(p.sequences) for p in passes if p.prefill) == 3


@pytest.mark.parametrize("length", [0, 10, 11])
def test_a_prompt_without_room_is_refused(length):
    with pytest.raises(ValueError, match=rf"prompt 1 has {length} tokens.*max_length = 10"):
        Schedule([[1], [1] * length], batch_size=2, max_new_tokens=4, max_length=10, eos_ids={EOS})


def test_nothing_to_do():
    schedule = Schedule([], batch_size=2, max_new_tokens=4, max_length=10, eos_ids={EOS})
    assert schedule.finished and schedule.responses() == []

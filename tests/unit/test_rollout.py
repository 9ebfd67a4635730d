"""Continuous batching without a model: a scripted one says what each sequence would write."""

import random

import pytest
import torch

from nemo_tsdkd.distributed.counters import fold
from nemo_tsdkd.rollout.rows import Rows
from nemo_tsdkd.rollout.sampling import NO_TOKEN
from nemo_tsdkd.rollout.schedule import NOTHING, PREFILL_TOKENS, Response, Row, Schedule, row_bucket

EOS = 0


def play(prompts, scripts, sync_every=1, **limits):
    """Run a schedule against `scripts`; check every pass against a cache kept in plain lists.

    Returns the responses, and the number of rows of each pass: (of a prefill, of a decode step).
    """
    schedule = Schedule(prompts, **{"eos_ids": {EOS}, "max_length": 1000, **limits})
    cache: dict[int, list[int]] = {}  # what each cache row holds
    passes = []
    while not schedule.finished:
        history = [[NOTHING] * limits["batch_size"]]
        for prefill in schedule.admit():
            passes.append((len(prefill.prompts), 0))
            for row, prompt in enumerate(prefill.prompts, prefill.first_row):
                cache[row] = list(prompt)
                history[0][row] = scripts[schedule.live[row]][0]
        rows = schedule.rows()
        assert len(rows) <= limits["batch_size"]
        texts = [scripts[row.sequence][: row.written] for row in rows]
        for text, drawn in zip(texts, history[0], strict=False):
            text += [drawn] * (drawn != NOTHING)
        for used in schedule.window(sync_every):
            live = [t[-1] != EOS and len(t) < row.limit for t, row in zip(texts, rows, strict=True)]
            passes.append((0, sum(live)))
            history.append([NOTHING] * limits["batch_size"])
            for i in (i for i in range(len(rows)) if live[i]):
                cache[i].append(texts[i][-1])
                assert cache[i] == prompts[rows[i].sequence] + texts[i], "a row holds its sequence up to the token fed"
                assert len(cache[i]) <= used <= schedule.cache_length
                history[-1][i] = scripts[rows[i].sequence][len(texts[i])]
                texts[i].append(history[-1][i])
        for source, target in schedule.record([column[: len(rows)] for column in history]):
            cache[target] = list(cache[source])
    return schedule.responses(), passes


def scripts_of(lengths):
    """Response i: tokens of its own, then EOS at `lengths[i]`."""
    return [[1000 * i + j + 1 for j in range(n - 1)] + [EOS] + [9] * 50 for i, n in enumerate(lengths)]


@pytest.mark.parametrize(("batch_size", "sync_every"), [(1, 1), (1, 7), (3, 1), (8, 4), (40, 1), (40, 100)])
def test_every_row_follows_its_sequence_and_every_response_comes_back_in_order(batch_size, sync_every):
    rng = random.Random(batch_size)
    prompts = [[rng.randrange(1, 99) for _ in range(rng.randint(1, 12))] for _ in range(40)]
    lengths = [rng.randint(1, 20) for _ in prompts]
    scripts = scripts_of(lengths)
    responses, _ = play(prompts, scripts, sync_every, batch_size=batch_size, max_new_tokens=15)
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
    prefills = [new for new, _ in passes if new]
    assert sum(prefills) == 64
    assert min(prefills) >= 2
    waiting_ends = max(i for i, (new, _) in enumerate(passes) if new)
    assert min(n for new, n in passes[:waiting_ends] if not new) > 16 - 2 - 2
    decoded = sum(not new for new, _ in passes)
    assert decoded < sum(max(lengths[i : i + 16]) for i in range(0, 64, 16))  # fixed batches of 16 need more


def test_a_prefill_is_bounded():
    prompts = [[1] * (PREFILL_TOKENS // 3)] * 7
    _, passes = play(prompts, scripts_of([2] * 7), batch_size=7, max_new_tokens=4, max_length=PREFILL_TOKENS)
    assert max(new for new, _ in passes) == 3


@pytest.mark.parametrize("length", [0, 10, 11])
def test_a_prompt_without_room_is_refused(length):
    with pytest.raises(ValueError, match=rf"prompt 1 has {length} tokens.*max_length = 10"):
        Schedule([[1], [1] * length], batch_size=2, max_new_tokens=4, max_length=10, eos_ids={EOS})


def test_nothing_to_do():
    schedule = Schedule([], batch_size=2, max_new_tokens=4, max_length=10, eos_ids={EOS})
    assert schedule.finished and schedule.responses() == []


def test_a_window_ends_where_no_row_may_write():
    schedule = Schedule([[1] * 3, [1]], batch_size=2, max_new_tokens=5, max_length=7, eos_ids={EOS})
    schedule.admit()
    assert schedule.window(8) == [4, 5, 6, 6]  # limits 4 and 5: the second row goes on at positions below
    assert schedule.window(2) == [4, 5]


@pytest.mark.parametrize(("rows", "most", "bucket"), [(1, 64, 1), (3, 64, 4), (5, 64, 8), (17, 64, 24), (17, 20, 20)])
def test_buckets_of_rows(rows, most, bucket):
    assert row_bucket(rows, most) == bucket


def test_rows_end_on_the_device_at_an_end_token_or_their_limit_and_then_stand_still():
    prompts = [[5, 5], [5], [5], [5]]
    schedule = Schedule(prompts, batch_size=4, max_new_tokens=4, max_length=5, eos_ids={EOS, 9})
    schedule.admit()
    rows = Rows(6, 5, [EOS, 9], torch.device("cpu"))
    rows.load(schedule.rows(), torch.zeros(4, dtype=torch.int64))
    used = slice(4)
    script = [[7, 1, 2, 3], [7, 9, 2, 2], [7, 3, 4, EOS], [EOS, 4, NO_TOKEN, 4]]  # a row each; limits 3, 4, 4, 4
    for tokens in zip(*script, strict=True):
        rows.tokens[used] = torch.tensor(tokens)
        rows.advance(used)
        rows.next_pass()
    no = NOTHING
    assert rows.read(4, 3) == [[7, 7, 7, EOS], [1, 9, 3, no], [2, no, 4, no], [no, no, EOS, no]]
    assert (rows.remaining <= 0).all()
    assert rows.positions.tolist() == [3, 1, 3, 0, 0, 0], "of the last token that was fed"
    schedule.record(rows.read(4, 3))
    assert [(r.token_ids, r.truncated) for r in schedule.responses()] == [
        ([7, 1, 2], True),
        ([7, 9], False),
        ([7, 3, 4, EOS], False),
        ([EOS], False),
    ]


def test_a_key_of_noise_is_that_of_the_sample_and_of_the_tokens_place_in_the_response():
    rows = Rows(3, 4, [], torch.device("cpu"))
    new, old = Row(1, 0, 3, 0, 9), Row(0, 7, 5, 4, 9)  # the old one draws nothing in pass 0, the prefill's
    rows.load([new, old], torch.tensor([111, -222]))
    assert rows.noise(slice(1)).tolist() == [fold(torch.tensor(-222), 0).item()]
    for step in range(4):
        rows.next_pass()
        keys = [fold(torch.tensor(-222), 1 + step).item(), fold(torch.tensor(111), 4 + step).item()]
        assert rows.noise(slice(2)).tolist() == keys


def test_a_row_without_a_drawable_token_is_marked_and_feeds_a_valid_token():
    rows = Rows(2, 4, [], torch.device("cpu"))
    rows.load([Row(0, 0, 3, 0, 9), Row(1, 0, 3, 0, 9)], torch.zeros(2, dtype=torch.int64))
    rows.tokens.copy_(torch.tensor([5, NO_TOKEN]))
    rows.advance(slice(2))
    assert rows.read(2, 0) == [[5, NO_TOKEN]]
    assert rows.remaining.tolist() == [8, 0] and rows.tokens.tolist() == [5, 0]

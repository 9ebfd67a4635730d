"""The decode step: the tokens of the decoder before it, in every layout; and fit to be a CUDA graph, without a GPU."""

import json
import logging
import weakref
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import rollout_record
import torch
from ranks import run_ranks
from regions import CpuCapture, Recorder, differences

RECORD = json.loads(rollout_record.FILE.read_text())
CASES = RECORD["cases"]
WRITTEN = [[(ids, truncated) for ids, truncated in case["written"]] for case in CASES]
GREEDY, RULES, LONG, MANY = 5, 6, 7, 8  # of CASES: greedy; top-k and top-p at once; two buckets of the cache; 24 rows


@pytest.fixture(scope="module")
def student(root):
    assert rollout_record.weights(root) == RECORD["weights"], "tiny_hf's student is not the one that was recorded"
    return root / "student"


def test_the_record_holds_what_it_is_for():
    rules = [case["rules"] for case in CASES]
    assert {rule["temperature"] == 0 for rule in rules} == {True, False}
    assert any(rule.get("top_k") and rule.get("top_p", 1) < 1 and rule["temperature"] for rule in rules)
    assert {truncated for written in WRITTEN for _, truncated in written} == {True, False}
    refilled = [case for case in CASES if len(case["prompts"]) > 2 * case["rules"]["batch_size"]]
    assert len(refilled) >= 3
    longest = [max(len(p) + len(w[0]) for p, w in zip(c["prompts"], c["written"], strict=True)) for c in CASES]
    assert max(longest) > 64, "more than one bucket of the cache"


@contextmanager
def replaced(name, value):
    from nemo_tsdkd.megatron.rollout import generation

    with patch.object(generation, name, value):
        yield


def recorder():
    """`graphs.Regions` with every run under a Recorder, and the runs of each key, those of all instances."""
    from nemo_tsdkd.megatron.rollout.graphs import Regions

    runs = {}

    class Recording(Regions):
        def run(self, key, region):
            with Recorder() as one:
                region()
            one.calls.clear()
            one.made.clear()
            runs.setdefault(key, []).append(one)

    return Recording, runs


def decoder_of(model, case, **rules):
    from megatron.core import parallel_state

    from nemo_tsdkd.config.schema import RolloutConfig
    from nemo_tsdkd.data.tokenizer import Vocabulary
    from nemo_tsdkd.megatron.rollout.generation import Decoder

    return Decoder(
        model,
        rollout_config=RolloutConfig(**case["rules"] | rules),
        vocabulary=Vocabulary(rollout_record.tiny_run.STUDENT_VOCAB, 0, tuple(case["eos_ids"])),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def call(decoder, case):
    names = ("prompts", "sample_ids", "seed", "step", "max_length")
    return [(r.token_ids, r.truncated) for r in decoder.generate(**{name: case[name] for name in names})]


def in_every_way(checkpoint, tp, pp):
    """On this rank: the cases' responses decoded eagerly and as replays; what the recorder found in each region."""
    from megatron.core import parallel_state

    from nemo_tsdkd.megatron.rollout.graphs import why_eager

    model = rollout_record.student(checkpoint, tp, pp)
    result = {"eager": [rollout_record.written(model, case) for case in CASES]}
    capture = CpuCapture()
    with replaced("new_capture", lambda *_: capture):
        result["graphs"] = [rollout_record.written(model, CASES[i]) for i in (GREEDY, RULES, MANY)]
    group = parallel_state.get_tensor_model_parallel_group()
    result["why"] = why_eager(torch.device("cuda"), group)
    result["captures"], result["replays"] = capture.captures, capture.replays
    result["found"], result["buckets"] = [], set()
    for case in CASES[RULES:] if tp * pp == 1 else CASES[RULES:LONG]:
        recording, runs = recorder()
        with replaced("Regions", recording), decoder_of(model, case) as decoder:
            assert call(decoder, case) == call(decoder, case)  # so that each bucket comes twice
        for key, (first, *others) in runs.items():
            assert others
            result["found"] += [(key, fault) for other in others for fault in differences(first, other)]
            result["buckets"].add(key)
    return result


@pytest.mark.parametrize(("tp", "pp"), rollout_record.LAYOUTS)
def test_every_layout_writes_what_was_recorded_eagerly_and_as_graphs(student, tp, pp):
    for rank in run_ranks(in_every_way, tp * pp, student, tp, pp):
        assert rank["eager"] == WRITTEN
        assert rank["graphs"] == [WRITTEN[i] for i in (GREEDY, RULES, MANY)]
        assert rank["captures"] > 5 and rank["replays"] > 3 * rank["captures"]
        assert not rank["found"]
        rows, used = ({key[i] for key in rank["buckets"] if isinstance(key, tuple)} for i in (0, 1))
        assert tp * pp > 1 or (rows == {1, 2, 3, 4, 8, 16, 24} and used == {64, 128})
        assert "gloo" in rank["why"] if tp > 1 else rank["why"] is None  # gloo's collectives cannot be captured


def test_reused_rollouts_are_those_recorded_and_an_optimizer_step_moves_no_weight(root, tmp_path):
    """What lets graphs outlive a step: distributed data parallelism keeps each parameter in a buffer of its own."""
    for steps, addresses in run_ranks(rollout_record.reused, 2, root, tmp_path, meet=False):
        assert steps[0] == steps[1] == RECORD["reused"]
        assert steps[2] == steps[3] != steps[0]
        assert len(addresses) == 4 and addresses[0] and all(a == addresses[0] for a in addresses)


def windows(checkpoint):
    """Responses of some cases for other lengths of the window between two looks of the host, and the looks."""
    from nemo_tsdkd.rollout.rows import Rows

    model, results, looks = rollout_record.student(checkpoint, 1, 1), {}, {}
    read = Rows.read
    for sync_every in (1, 3, 8, 64):
        with patch.object(Rows, "read", autospec=True, side_effect=read) as reads:
            results[sync_every] = [
                rollout_record.written(model, CASES[i], sync_every=sync_every) for i in (RULES, LONG, MANY)
            ]
        looks[sync_every] = [reads.call_count, sum(call.args[2] for call in reads.call_args_list)]
    return results, looks


def test_what_a_row_computes_after_its_end_shows_nowhere_and_the_host_reads_once_a_window(student):
    results, looks = run_ranks(windows, 1, student)[0]
    assert all(written == WRITTEN[RULES:] for written in results.values())
    reads, steps = looks[8]
    assert reads <= steps / 8 + 6  # three rollouts, each with a short last window or two
    assert looks[1][0] >= looks[1][1] > 100


WIDE = CASES[MANY] | {
    "rules": CASES[MANY]["rules"] | {"max_new_tokens": 60},
    "max_length": 80,
}  # eos_ids, rules of many rows


def lifetimes(checkpoint):
    """One decoder through what may happen to its graphs: for each event, whether it then writes what a new eager one
    does, that text, and how many graphs it has dropped so far."""
    from nemo_tsdkd.megatron.checkpoints.load import load_weights

    model, case, capture, seen = rollout_record.student(checkpoint, 1, 1), CASES[RULES], CpuCapture(), {}

    def look(event, case=case):
        with replaced("new_capture", lambda *_: None), decoder_of(model, WIDE) as eager:
            expected = call(eager, case)
        seen[event] = call(decoder, case) == expected, expected, capture.captures - decoder.regions.captured

    with replaced("new_capture", lambda *_: capture), decoder_of(model, WIDE) as decoder:
        look("begun")
        look("again")
        parameters = list(model.parameters())
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        torch.optim.AdamW(parameters, lr=0.05).step()
        look("stepped")
        parameters[3].data = parameters[3].data * 1.5  # as a restored copy would, it lies elsewhere
        look("moved")
        load_weights(model, checkpoint)
        look("loaded")
        look("grown", WIDE)
        decoder.release()
        look("released")
    return seen


def test_graphs_are_kept_while_the_weights_stay_and_dropped_when_one_moves(student):
    seen = run_ranks(lifetimes, 1, student)[0]
    assert all(equal for equal, _, _ in seen.values()), seen
    text, dropped = ({event: x[i] for event, x in seen.items()} for i in (1, 2))
    assert dropped["begun"] == dropped["again"] == dropped["stepped"] == 0
    assert 0 < dropped["moved"] == dropped["loaded"] < dropped["grown"] < dropped["released"]
    assert text["begun"] == text["again"] == text["loaded"] == text["released"]
    assert text["begun"] != text["stepped"] != text["moved"] != text["loaded"], "the weights' change must show"


class FailingCapture(CpuCapture):
    def __call__(self, region):
        if self.captures == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        return super().__call__(region)


def falls_back(checkpoint):
    """Lines logged, whether the tokens stay, and what is left, where a capture fails and where none is possible."""
    from nemo_tsdkd.megatron.rollout import generation, graphs

    lines, caches = [], []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    graphs.logger.addHandler(handler)

    class Watched(generation.KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(weakref.ref(self))

    model = rollout_record.student(checkpoint, 1, 1)
    with replaced("new_capture", lambda *_: FailingCapture()), replaced("KVCache", Watched):
        written = [rollout_record.written(model, CASES[i]) for i in (RULES, MANY)]
    for mode in ("off", "auto", "auto"):
        written.append(rollout_record.written(model, CASES[RULES], cuda_graphs=mode))
    return lines, written, [cache() is None for cache in caches]


def test_a_failed_capture_is_logged_once_and_decoding_continues_without_its_memory(student):
    lines, written, freed = run_ranks(falls_back, 1, student)[0]
    assert written == [WRITTEN[i] for i in (RULES, MANY, RULES, RULES, RULES)]
    first, second = lines  # of four rollouts without graphs; "off" is the user's word
    assert "failed (operation not permitted when stream is capturing)" in first
    assert "the model is not on a CUDA device" in second
    assert freed == [True, True], "a rollout's memory is the update's: nothing may hold it"


def broken(checkpoint):
    """For a student that cannot read one token (NaN): what `generate` says, and what it should name, on both stages."""
    model = rollout_record.student(checkpoint, 1, 2)
    case = CASES[MANY] | {"prompts": [[1, 2, 3], [4, 5]], "sample_ids": [70, 90], "eos_ids": []}
    written = [ids for ids, _ in rollout_record.written(model, case)]
    place, token = next((i, t) for i, t in enumerate(written[1]) if i > 10 and t not in written[0] + written[1][:i])
    if model.pre_process:
        with torch.no_grad():
            model.embedding.word_embeddings.weight[token] = torch.nan
    with pytest.raises(FloatingPointError) as error:
        rollout_record.written(model, case)
    return str(error.value), f"response token {place + 1} of sample 90: the student's logits are NaN"


def test_broken_logits_stop_all_stages_and_name_sample_and_token(student):
    for message, expected in run_ranks(broken, 2, student):
        assert message.startswith(expected)

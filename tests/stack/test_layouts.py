"""The layout changes nothing: losses, metrics and weights of a run are those of one process."""

from pathlib import Path

import pytest
import ranks
import tiny_run
import torch
from interruptions import TIMES, saved_weights

from nemo_tsdkd.checkpoints.manifest import step_folder
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.reporting.rows import read_metrics, read_samples

TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"
RECOMPUTE = "recompute"
LAYOUTS = {
    "tp2": (2, {TP: 2}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "pp2": (2, {PP: 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {TP: 2, PP: 2}),
    "tp2_pp2_sp": (4, {TP: 2, PP: 2, SP: True}),
}
HEADS = {"tp2_pp2_sp": "fused"}  # the other layouts take the loss from logits


def run(config: TrainConfig) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train on this rank; return the metrics and the trained weights of the whole model, without padding rows."""
    from nemo_tsdkd.megatron.train import train

    train(config)
    return results(Path(config.run_dir), config.max_steps)


def results(run_dir: Path, steps: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    weights = saved_weights(step_folder(run_dir, steps))
    table = "module.embedding.word_embeddings.weight"
    weights[table] = weights[table][: tiny_run.STUDENT_VOCAB]  # padded by the layout
    return read_metrics(run_dir / "metrics.jsonl"), weights


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """The reference: one process, off-policy."""
    return ranks.run_ranks(run, 1, tiny_run.config(root, tmp_path_factory.mktemp("alone"), 1))[0]


@pytest.fixture(scope="module")
def validated(root, tmp_path_factory):
    """The reference with validation, and its run's folder."""
    run_dir = tmp_path_factory.mktemp("validated")
    config = tiny_run.config(root, run_dir, 1)
    tiny_run.validate(config, root, 2, "none")
    return *ranks.run_ranks(run, 1, config)[0], run_dir


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_equal_those_of_one_process(layout, root, alone, validated, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    config = tiny_run.config(root, tmp_path, world_size, **parallel)
    config.objective.head = HEADS.get(layout, "logits")
    tiny_run.validate(config, root, 2, "none")
    steps, weights = ranks.run_ranks(run, world_size, config)[0]
    compare(training(steps), weights, *alone)
    compare_validation(steps, tmp_path, validated)


def test_validation_and_samples_change_no_bit_of_the_training(alone, validated):
    steps, weights, _ = validated
    assert [s["step"] for s in steps if "validation_divergence" in s] == [0, 2, 4, 5]
    assert [without_times(step) for step in training(steps)] == [without_times(step) for step in alone[0]]
    assert weights.keys() == alone[1].keys()
    assert all(torch.equal(weights[name], value) for name, value in alone[1].items())


def training(steps: list[dict]) -> list[dict]:
    """The rows without what validation adds."""
    rows = [{name: v for name, v in step.items() if not name.startswith("validation_")} for step in steps]
    return [row for row in rows if row["step"]]


def without_times(step: dict) -> dict:
    return {name: value for name, value in step.items() if name not in TIMES}


def compare_validation(steps: list[dict], run_dir: Path, validated: tuple) -> None:
    """All held-out prompts were answered as by one process, and the samples say the same of each token."""
    expected_steps, _, expected_dir = validated
    for step, expected in zip(steps, expected_steps, strict=True):
        assert step["step"] == expected["step"]
        names = [name for name in expected if name.startswith("validation_") and name not in TIMES]
        assert {name: step.get(name) for name in names} == pytest.approx({name: expected[name] for name in names})
    found, reference = (read_samples(folder / "samples.jsonl") for folder in (run_dir, expected_dir))
    kinds = [(s["step"], s["kind"], s["index"]) for s in reference]
    both = [(2, "train", 8), (2, "train", 9), (2, "validation", 0), (2, "validation", 1)]
    assert kinds[:6] == [(0, "validation", 0), (0, "validation", 1), *both]
    for sample, expected in zip(found, reference, strict=True):
        tokens, expected_tokens = sample.pop("tokens"), expected.pop("tokens")
        assert sample == expected and tokens.keys() == expected_tokens.keys()
        for name, column in expected_tokens.items():
            if name in ("text", "opener", "uncertain"):
                assert tokens[name] == column
            else:
                assert tokens[name] == pytest.approx(column, rel=2e-3)  # of four digits
        sample["tokens"], expected["tokens"] = tokens, expected_tokens


def run_watched(config: TrainConfig) -> tuple[list[dict], dict[str, torch.Tensor], dict[str, list]]:
    """As `run`, and what this rank did: the shape of each micro-batch, how often it recomputed a part, the responses of
    its replica's steps, and what the loss took for them."""
    from megatron.core.tensor_parallel.random import CheckpointFunction

    from nemo_tsdkd.megatron import model as module

    TSDKDModel = module.TSDKDModel
    seen: dict[str, list] = {"shapes": [], "recomputed": [], "responses": [], "labels": []}
    forward_step, backward = TSDKDModel.forward_step, CheckpointFunction.backward
    respond, losses = TSDKDModel.respond, (module.tsdkd_loss, module.tsdkd_loss_from_hidden)

    def watched_step(self, batch):
        seen["shapes"].append(tuple(batch.micro_batch["tokens"].shape))
        return forward_step(self, batch)

    def watched_backward(ctx, *grads):
        seen["recomputed"].append(ctx.run_function)
        return backward(ctx, *grads)

    def watched_respond(self, samples, step):
        responses = respond(self, samples, step)
        seen["responses"] += [r.token_ids for r in responses]
        return responses

    def watched(loss):
        def call(*args, labels, **fields):
            mask = args[-2]
            seen["labels"] += [labels[mask[:, b], b].tolist() for b in range(mask.shape[1])]
            return loss(*args, labels=labels, **fields)

        return call

    TSDKDModel.forward_step, CheckpointFunction.backward = watched_step, staticmethod(watched_backward)
    TSDKDModel.respond = watched_respond
    module.tsdkd_loss, module.tsdkd_loss_from_hidden = map(watched, losses)
    steps, weights = run(config)
    return steps, weights, seen | {"recomputed": [len(seen["recomputed"])]}


# Ranks, layout, `parallel.recompute`, `micro_batch_tokens`, the teacher's own layout.
LEVERS = {
    "full_tp2_pp2_sp": (4, {TP: 2, PP: 2, SP: True}, "full", 0, {}),
    "selective_tp2_pp2": (4, {TP: 2, PP: 2}, "selective", 0, {}),
    "tokens_dp2": (2, {}, "none", 110, {}),
    "tokens_selective_tp2_pp2_sp": (4, {TP: 2, PP: 2, SP: True}, "selective", 250, {}),
    "tokens_full_dp2_tp2_of_dp2_pp2": (4, {TP: 2, SP: True}, "full", 192, {TP: 1, PP: 2}),
}
# Parts of each layer whose products are repeated: attention's core and MLP, or the layer.
PARTS = {"none": 0, "selective": 2, "full": 1}


@pytest.mark.parametrize("name", LEVERS)
def test_recompute_and_a_token_budget_change_nothing(name, root, alone, tmp_path):
    world_size, parallel, recompute, tokens, teacher = LEVERS[name]
    config = tiny_run.config(root, tmp_path, world_size, **parallel)
    config.parallel.recompute, config.micro_batch_tokens = recompute, tokens
    config.micro_batch_size, config.teacher.micro_batch_size = 1 if tokens else 2, 3 if tokens else 1
    config.objective.head = HEADS.get(name.removeprefix("full_"), "logits")
    for field, value in teacher.items():
        setattr(config.teacher.parallel, field, value)
    outcomes = ranks.run_ranks(run_watched, world_size, config)
    compare(*outcomes[0][:2], *alone)
    require_used(config, [seen for *_, seen in outcomes])


def require_used(config: TrainConfig, seen: list[dict[str, list]]) -> None:
    """Both levers had the effect that is asked for, on every rank; the loss's labels are the responses."""
    layers = 2 // config.parallel.pipeline_model_parallel_size
    (count,) = {len(rank["shapes"]) for rank in seen}  # equal on all ranks
    rows = config.max_steps * config.global_batch_size // config.data_parallel_size
    assert all(rank["recomputed"] == [count * layers * PARTS[config.parallel.recompute]] for rank in seen)
    assert all(sum(n for n, _ in rank["shapes"]) == rows for rank in seen)
    last_stages = [rank for rank in seen if rank["labels"]]
    assert len(last_stages) == len(seen) // config.parallel.pipeline_model_parallel_size
    assert all(sorted(rank["labels"]) == sorted(rank["responses"]) for rank in last_stages)
    if config.micro_batch_tokens:
        assert all(n * width <= config.micro_batch_tokens for rank in seen for n, width in rank["shapes"])
        assert len({n for rank in seen for n, _ in rank["shapes"]}) > 1  # fewer rows where they are longer
        assert count < rows


@pytest.mark.parametrize("change", ["micro_batch_size", "teacher_rows", "offload_hidden_states", "offload_weights"])
def test_how_a_batch_is_cut_and_kept_changes_nothing(change, root, alone, tmp_path):
    config = tiny_run.config(root, tmp_path, 1)
    match change:
        case "micro_batch_size":
            config.micro_batch_size = 8
        case "teacher_rows":
            config.teacher.micro_batch_size = 2
        case "offload_hidden_states":
            config.teacher.offload_hidden_states = True
        case "offload_weights":
            config.teacher.offload_weights = True
    compare(*ranks.run_ranks(run, 1, config)[0], *alone)


def test_on_policy_steps_equal_those_of_one_process(root, tmp_path):
    """The student's own responses too: its noise knows seed, step and sample, not ranks. The loss is the mean over the
    tokens of the global batch, which four micro-batches, or two on each of two data-parallel ranks, share unevenly, and
    micro-batches by a token budget, too. Its rules look at all that rules may look at, and the horizon grows."""
    found = []
    for world_size, parallel, tokens in ((1, {}, 0), (4, {TP: 2, SP: True}, 0), (4, {TP: 2, RECOMPUTE: "full"}, 144)):
        run_dir = tmp_path / str(len(found))
        config = tiny_run.config(root, run_dir, world_size, lmbda=1.0, **parallel)
        config.objective.reduction, config.objective.gate_rule = "token", "importance_weight"
        config.objective.entropy_rule, config.objective.opener_rule = "tip", "random_share"
        config.rollout.horizon, config.rollout.horizon_from = "linear", 4
        if tokens:
            config.micro_batch_size, config.micro_batch_tokens = 1, tokens
        outcomes = ranks.run_ranks(run_watched, world_size, config)
        require_used(config, [seen for *_, seen in outcomes])
        found.append(outcomes[0][:2])
    compare(*found[1], *found[0])
    compare(*found[2], *found[0])
    longest = [step["response_length_p95"] for step in found[0][0]]
    assert all(length <= horizon for length, horizon in zip(longest, (4, 7, 10, 13, 16), strict=True))
    assert longest[0] == 4 and max(longest) > 10


@pytest.mark.parametrize("layout", [None, "tp2_pp2_sp"])
def test_bf16_stays_near_fp32(layout, root, alone, tmp_path):
    """The arithmetic of production, whose numbers hold three digits."""
    world_size, parallel = LAYOUTS[layout] if layout else (1, {})
    config = tiny_run.config(root, tmp_path, world_size, **parallel)
    config.precision.name = config.teacher.precision = "bf16"
    losses = [step["loss"] for step in ranks.run_ranks(run, world_size, config)[0][0]]
    expected = [step["loss"] for step in alone[0]]
    assert losses == pytest.approx(expected, rel=0.01) and losses != pytest.approx(expected, rel=1e-5)


def test_bf16_on_policy(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 2, lmbda=1.0, **{TP: 2})
    config.precision.name = config.teacher.precision = "bf16"
    steps, _ = ranks.run_ranks(run, 2, config)[0]
    assert all(step["response_tokens"] > 8 for step in steps)  # more than one for each of 8 prompts
    assert steps[-1]["loss"] < steps[0]["loss"]


def compare(steps, weights, expected_steps, expected_weights):
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    for step, expected in zip(steps, expected_steps, strict=True):
        assert step.keys() == expected.keys()
        for name in expected.keys() - {*TIMES, "teacher_bytes_sent"}:
            assert step[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (step["step"], name)
    assert steps[-1]["loss"] != pytest.approx(steps[0]["loss"], rel=1e-4)  # something was learned at all
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

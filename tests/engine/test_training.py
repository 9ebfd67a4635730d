"""Whole training steps over Transformer Engine, through `train()`."""

from collections import Counter

import pytest
import tiny_run
from training_runs import CP, PP, SP, TP, compare, run

STEPS = 2


def configure(root, run_dir, world_size, name, lmbda=0.0, **layout):
    """Two steps of both models in the precision `name`, without bf16 layers: the student has two."""
    config = tiny_run.config(root, run_dir, world_size, lmbda=lmbda, **layout)
    config.max_steps, config.data.seq_length = STEPS, 128
    config.precision.name = config.teacher.precision = name
    config.precision.first_last_layers_bf16 = False
    return config


def times_quantized(of_run, which: str) -> Counter:
    """How often each weight of the `student` or the `teacher` was quantized."""
    return Counter(call.weight for call in of_run.quantized if call.weight and call.weight.startswith(f"{which}:"))


def require_once_a_step(of_run, which: str, layers: int) -> None:
    times = times_quantized(of_run, which)
    assert len(times) == 4 * layers and set(times.values()) == {STEPS}, times


def test_layouts_and_fusions_change_nothing_in_fp32(root, tmp_path):
    """Sequence-parallel norms, pipeline stages, the rotary kernel, gradients accumulated inside the products."""
    alone = run(configure(root, tmp_path / "1", 1, "fp32"), fusions=False)[0]
    whole = run(configure(root, tmp_path / "4", 4, "fp32", **{TP: 2, PP: 2, SP: True}))[0]
    compare(whole, alone, metrics=1e-5, tipping=1e-5, updates=1e-3)
    assert not alone.quantized and not whole.quantized


@pytest.mark.parametrize("head", ["logits", "fused"])
def test_fp8_on_policy_with_tensor_pipeline_and_sequence_parallelism(head, root, tmp_path):
    losses = {}
    for name in ("bf16", "fp8_tensorwise"):
        config = configure(root, tmp_path / name, 4, name, lmbda=1.0, **{TP: 2, PP: 2, SP: True})
        config.objective.head = head
        outcomes = run(config)
        losses[name] = [row["loss"] for row in outcomes[0].metrics]
        for outcome in outcomes:
            assert outcome.metrics[0]["response_tokens"] > 8  # more than one for each of 8 prompts
            if name == "fp8_tensorwise":  # the layers of this stage
                require_once_a_step(outcome, "student", 1)
                require_once_a_step(outcome, "teacher", 2)
    assert losses["fp8_tensorwise"] == pytest.approx(losses["bf16"], rel=0.1)
    assert losses["fp8_tensorwise"] != losses["bf16"]


def test_a_teacher_on_the_host_and_recomputed_activations_are_the_same_in_fp8(root, tmp_path):
    outcomes = {}
    for name in ("kept", "host", "selective", "full"):
        config = configure(root, tmp_path / name, 1, "fp8_tensorwise")
        config.teacher.offload_weights = config.teacher.offload_hidden_states = name == "host"
        config.parallel.recompute = name if name in ("selective", "full") else "none"
        outcomes[name] = run(config)[0]
        require_once_a_step(outcomes[name], "teacher", 4)
        if config.parallel.recompute == "none":
            require_once_a_step(outcomes[name], "student", 2)
        else:  # copies that were made without a gradient in sight lack the transpose: the run's first backward adds it
            times = times_quantized(outcomes[name], "student")
            assert len(times) == 8 and set(times.values()) <= {STEPS, STEPS + 1}, times
    for outcome in outcomes.values():
        compare(outcome, outcomes["kept"], metrics=0, tipping=0, updates=0)


def test_blocks_with_sequence_parallelism(wide, tmp_path):
    """Quantized rows are gathered in blocks; student and teacher are both in FP8."""
    outcomes = {}
    for layout, parallel in {"tp1": {}, "tp2_sp": {TP: 2, SP: True}}.items():
        world_size = parallel.get(TP, 1)
        config = configure(wide, tmp_path / layout, world_size, "fp8_blockwise", **parallel)
        config.data.seq_length = 256
        outcomes[layout] = run(config)[0]
        for which in ("student", "teacher"):
            require_once_a_step(outcomes[layout], which, 4)
        assert {call.scaling for call in outcomes[layout].quantized} == {"1D", "2D"}
    compare(outcomes["tp2_sp"], outcomes["tp1"], metrics=0.1, tipping=0.4, updates=0.8)


def test_the_first_and_last_layers_flag_holds_for_both_models(wide, tmp_path):
    config = configure(wide, tmp_path, 1, "fp8_tensorwise")
    config.precision.first_last_layers_bf16 = True
    outcome = run(config)[0]
    for which in ("student", "teacher"):
        layers = {name.split(".layers.")[1][0] for name in times_quantized(outcome, which)}
        assert layers == {"1", "2"}, which


def test_fp8_with_context_and_tensor_parallelism(root, tmp_path):
    alone = run(configure(root, tmp_path / "1", 1, "fp8_tensorwise"))[0]
    split = run(configure(root, tmp_path / "4", 4, "fp8_tensorwise", **{CP: 2, TP: 2, SP: True}))[0]
    require_once_a_step(split, "student", 2)
    compare(split, alone, metrics=0.1, tipping=0.4, updates=0.8)


def test_an_fp8_teacher_in_a_layout_of_its_own(root, tmp_path):
    """Its groups take the place of the student's for its pass, also in Transformer Engine's modules."""
    one = run(configure(root, tmp_path / "one", 2, "fp8_tensorwise"))[0]
    config = configure(root, tmp_path / "own", 2, "fp8_tensorwise")
    config.teacher.parallel.tensor_model_parallel_size = 2
    config.teacher.parallel.sequence_parallel = True
    own = run(config)[0]
    require_once_a_step(own, "teacher", 4)
    compare(own, one, metrics=0.1, tipping=0.4, updates=0.8)

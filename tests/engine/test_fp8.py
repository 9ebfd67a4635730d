"""A model in FP8: its error, its recipe, its layouts, and what it keeps of its weights."""

from pathlib import Path

import pytest
import ranks
import torch
from megatron_chunk import build

from nemo_tsdkd.checks import memory, precision

TP, SP = "tp", "sequence_parallel"
LAYERS = 4
PER_LAYER = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}


def chunk(checkpoint: Path, name: str, first_last: bool = False, **layout):
    """This rank's shard in the precision `name`, as a run would configure it."""
    settings = precision.model_settings(name, first_last) | {"gradient_accumulation_fusion": False}
    return build(checkpoint, **layout, **settings)


def logits_of(model, rows: int = 2, length: int = 64) -> torch.Tensor:
    """Logits [rows, length, V/TP] of fixed tokens."""
    tokens = torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(5))
    return model(tokens, torch.arange(length)[None].expand_as(tokens), None).float()


def all_logits(checkpoint: Path, names: list[str], layouts: list[dict]) -> dict:
    """By (precision, layout): this rank's logits without gradient."""
    out = {}
    for name in names:
        for i, layout in enumerate(layouts):
            with torch.no_grad():
                out[name, i] = logits_of(chunk(checkpoint, name, **layout), length=128)
    return out


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def test_errors_lie_where_the_formats_put_them(wide):
    """bf16 has 8 bits of mantissa, e4m3 has 4: half a step is 2^-9 against 2^-5 of each factor, through four layers."""
    logits = ranks.run_ranks(all_logits, 1, wide / "teacher", list(precision.NAMES), [{}])[0]
    errors = {name: relative(logits[name, 0], logits["fp32", 0]) for name in precision.NAMES}
    assert errors["fp32"] == 0 and 1e-3 < errors["bf16"] < 0.02
    for name in precision.FP8:
        assert 3 * errors["bf16"] < errors[name] < 0.25, errors


def test_sequence_parallelism_changes_no_bit_of_fp8(wide):
    """Each rank quantizes its own rows before they are gathered: with the scale of all, or in whole blocks."""
    layouts = [{TP: 2}, {TP: 2, SP: True}]
    names = ["bf16", *precision.FP8]
    for logits in ranks.run_ranks(all_logits, 2, wide / "teacher", names, layouts):
        for name in names:
            assert torch.equal(logits[name, 0], logits[name, 1]), name
        assert relative(logits["fp8_blockwise", 0], logits["bf16", 0]) > 0.01


def recipe(checkpoint: Path, name: str, first_last: bool) -> tuple[list, list, int, int]:
    """Of two forward and backward passes of one optimizer step: what each quantized; bytes kept, weights' elements."""
    import spy

    model = chunk(checkpoint, name, first_last)
    passes = []
    model.set_is_first_microbatch()
    for _ in range(2):
        with spy.quantizations(model=model) as calls:
            logits_of(model).square().mean().backward()
        passes.append(calls)
    fp8 = {call.weight for call in passes[0]}
    weights = sum(p.numel() for n, p in spy.linear_weights(model).items() if f"model:{n}" in fp8)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    return *passes, spy.cached_bytes(model), weights


@pytest.mark.parametrize("first_last", [False, True], ids=["all_layers", "inner_layers"])
@pytest.mark.parametrize("name", list(precision.FP8))
def test_the_recipe_its_layers_and_what_is_kept(name, first_last, root):
    first, second, kept, weights = ranks.run_ranks(recipe, 1, root / "teacher", name, first_last)[0]
    formats = {(c.dtype, c.scaling, c.weight is not None) for c in first}
    if name == "fp8_tensorwise":  # gradients in the wider format
        expected = {("kFloat8E4M3", "whole", True), ("kFloat8E4M3", "whole", False), ("kFloat8E5M2", "whole", False)}
    else:
        expected = {("kFloat8E4M3", "2D", True), ("kFloat8E4M3", "1D", False)}
    assert formats == expected
    layers = range(1, LAYERS - 1) if first_last else range(LAYERS)
    names = [c.weight for c in first if c.weight]
    assert sorted(names) == sorted(f"model:decoder.layers.{i}.{part}.weight" for i in layers for part in PER_LAYER)
    assert not [c for c in second if c.weight], "weights are quantized once a step"
    assert len(second) == len(first) - len(names)  # inputs and gradients each time
    assert kept == memory.FP8_STUDENT * weights


def teacher_readings(checkpoint: Path, name: str, offload: bool) -> dict:
    """Hidden states of a teacher, of the same one once other weights are in it, and of a new one with those weights."""
    import spy

    from nemo_tsdkd.config.schema import TeacherConfig
    from nemo_tsdkd.megatron.checkpoints.load import gpt_config
    from nemo_tsdkd.megatron.teacher_pass import TeacherPass

    build(checkpoint)  # Megatron's groups
    tokens = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(5))
    batch = {"tokens": tokens, "position_ids": torch.arange(64)[None].expand_as(tokens)}
    batch["response_mask"] = torch.ones_like(tokens, dtype=torch.bool)

    def teacher() -> TeacherPass:
        config = gpt_config(checkpoint)
        for field, value in precision.model_settings(name, False).items():
            setattr(config, field, value)
        return TeacherPass(config, checkpoint, TeacherConfig(offload_weights=offload), None, keep_head=True)

    def hidden(of: TeacherPass) -> torch.Tensor:
        return of.forward([batch, batch], rows=2 * tokens.numel())

    def load_others(of: TeacherPass) -> None:
        """In place, as `load_weights` does; where they wait on the host, there."""
        with torch.no_grad():
            for parameter in of.module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))

    old, new = teacher(), teacher()
    seen = {"before": hidden(old), "kept": spy.cached_bytes(old.module)}
    with spy.quantizations(teacher=old.module) as calls:
        seen["again"] = hidden(old)
    seen["weights"] = sum(p.numel() for p in spy.linear_weights(old.module).values())
    seen["scalings"] = {call.scaling for call in calls}
    seen["times"] = len([call for call in calls if call.weight]) / len(spy.linear_weights(old.module))
    load_others(old)
    load_others(new)
    return seen | {"after": hidden(old), "expected": hidden(new)}


@pytest.mark.parametrize("offload", [False, True], ids=["on_device", "offloaded"])
@pytest.mark.parametrize("name", list(precision.FP8))
def test_a_teacher_is_quantized_anew_after_a_load_and_keeps_one_copy(name, offload, root):
    seen = ranks.run_ranks(teacher_readings, 1, root / "teacher", name, offload)[0]
    assert torch.equal(seen["before"], seen["again"])
    assert torch.equal(seen["after"], seen["expected"]) and relative(seen["after"], seen["before"]) > 0.05
    assert seen["scalings"] == ({"whole"} if name == "fp8_tensorwise" else {"1D", "2D"})
    assert seen["times"] == 1, "once for both micro-batches"
    assert seen["kept"] == (0 if offload else memory.FP8_TEACHER * seen["weights"])

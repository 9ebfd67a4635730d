"""What only a GPU can tell: kernels, ours and Transformer Engine's. Skipped, never passed, without one."""

import json
from pathlib import Path

import oracle
import pytest
import ranks
import tiny_run
import torch
from engine_cases import *  # noqa: F403  tests
from objective_cases import Case

from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss, tsdkd_loss_from_hidden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(1800),  # ranks import NeMo each for itself (ranks.py)
]


def on_gpu(tensors):
    return {name: value.cuda() for name, value in tensors.items()}


# On the same rounded inputs: of bf16 only the gradient that is returned is rounded.
@pytest.mark.parametrize("mode", ["auto", "off"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_the_logits_path_equals_the_oracle(dtype, tolerance, mode):
    case = Case(ObjectiveConfig(compile=mode))
    cpu = case.tensors(dtype)
    exact = {name: value.double() for name, value in cpu.items() if name != "mask"}
    exact["student"].requires_grad_()
    expected = oracle.loss_sum(exact["student"], exact["teacher"], cpu["mask"], case.config, case.vocab_size)
    expected.backward()
    given = on_gpu(cpu)
    given["student"].requires_grad_()
    out = tsdkd_loss(given["student"], given["teacher"], given["mask"], case.config)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=tolerance)
    error = (given["student"].grad.cpu().double() - exact["student"].grad).norm() / exact["student"].grad.norm()
    assert error < tolerance


def test_the_fused_head_equals_the_logits_path():
    case = Case()
    given, mask = on_gpu(case.hidden(torch.float32)), case.tensors(torch.float32)["mask"].cuda()
    for name in ("student_hidden", "student_weight"):
        given[name].requires_grad_()
    fused = tsdkd_loss_from_hidden(**given, response_mask=mask, config=case.config)
    logits = [given[f"{m}_hidden"] @ given[f"{m}_weight"].T for m in ("student", "teacher")]
    plain = tsdkd_loss(logits[0], logits[1].detach(), mask, case.config)
    assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=1e-4)  # TF32 may round the products
    inputs = [given["student_hidden"], given["student_weight"]]
    for a, b in zip(torch.autograd.grad(fused.loss, inputs), torch.autograd.grad(plain.loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def graphs_and_eager_steps(checkpoint: Path) -> dict:
    """What a real capture may change, and what it holds: tokens with and without graphs, also after the weights
    changed in place and after one moved; graphs captured; bytes reserved before, with and after them."""
    import rollout_record

    from nemo_tsdkd.config.schema import RolloutConfig
    from nemo_tsdkd.data.tokenizer import Vocabulary
    from nemo_tsdkd.megatron.rollout.generation import Decoder

    model = rollout_record.student(checkpoint, 1, 1).cuda()
    cases = json.loads(rollout_record.FILE.read_text())["cases"]
    case = cases[-1]
    call = {name: case[name] for name in ("prompts", "sample_ids", "seed", "step", "max_length")}

    def decoder(**rules):
        config = RolloutConfig(**case["rules"] | rules)
        vocabulary = Vocabulary(tiny_run.STUDENT_VOCAB, 0, tuple(case["eos_ids"]))
        return Decoder(model, rollout_config=config, vocabulary=vocabulary, tp_group=None, pp_group=None)

    def eager():
        with decoder(cuda_graphs="off") as other:
            return other.generate(**call)

    torch.cuda.empty_cache()
    seen = {"reserved": [torch.cuda.memory_reserved()], "graphs": [], "equal": []}
    with decoder() as kept:
        for change in ("none", "none", "in place", "moved", "none"):
            parameter = next(model.parameters())
            if change == "in place":
                parameter.data.mul_(1.5)
            elif change == "moved":
                parameter.data = parameter.data / 1.5
            seen["equal"].append(kept.generate(**call) == eager())
            seen["graphs"].append(kept.regions.captured)
        seen["reserved"].append(torch.cuda.memory_reserved())
    torch.cuda.empty_cache()
    seen["reserved"].append(torch.cuda.memory_reserved())
    seen["rules"] = [
        rollout_record.written(model, case) == rollout_record.written(model, case, cuda_graphs="off") for case in cases
    ]
    return seen


def test_cuda_graphs_write_what_eager_steps_do_and_leave_no_memory(root):
    seen = ranks.run_ranks(graphs_and_eager_steps, 1, root / "student")[0]
    assert all(seen["equal"]) and all(seen["rules"]), seen  # the same kernels: not even rounding may differ
    first, second, in_place, moved, again = seen["graphs"]
    assert second == in_place == again > 5 and first > 0 and moved > 0, seen
    before, with_graphs, after = seen["reserved"]
    assert before == after < with_graphs


def graphs_over_nccl(checkpoint: Path, tp: int, pp: int) -> list[bool]:
    import os

    import rollout_record
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    model = rollout_record.student(checkpoint, tp, pp).cuda()
    cases = json.loads(rollout_record.FILE.read_text())["cases"][-3:]
    return [
        rollout_record.written(model, case) == rollout_record.written(model, case, cuda_graphs="off") for case in cases
    ]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_cuda_graphs_with_nccl_inside_and_stages_outside(root, tp, pp):
    for rank in ranks.run_ranks(graphs_over_nccl, 2, root / "student", tp, pp, meet=False):
        assert all(rank)


def trained_peak(root: Path) -> int:
    """Most bytes that the device held in a run on one GPU whose rows are all of full length."""
    from nemo_tsdkd.megatron.train import train

    torch.cuda.reset_peak_memory_stats()
    train(full_rows(root))
    return torch.cuda.max_memory_allocated()


def full_rows(root: Path):
    config = tiny_run.config(root, root / "run", 1)
    config.precision.name = config.teacher.precision = "bf16"
    config.data.seq_length, config.data.apply_chat_template = 1024, False
    config.max_steps = config.checkpoint.every_n_steps = 2
    config.global_batch_size = config.micro_batch_size = 8
    config.objective.threshold = 1.0
    config.data.path = str(root / "full.jsonl")
    with (root / "full.jsonl").open("w") as file:
        for _ in range(16):
            file.write(json.dumps({"prompt": "A", "response": "", "response_ids": [5] * 1023}) + "\n")
    return config


def test_a_plan_s_peak_is_the_device_s(tmp_path):
    """Within a tenth: the plan leaves cuBLAS's and the allocator's own memory to `RESERVE`."""
    from nemo_tsdkd.checkpoints.shape import ModelShape
    from nemo_tsdkd.plan.hardware import Hardware
    from nemo_tsdkd.plan.plan import plan_job

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    root = tiny_run.prepare(tmp_path, **sizes)
    (peak,) = ranks.run_ranks(trained_peak, 1, root, meet=False)
    config = full_rows(root)
    config.student.path, config.teacher.path = str(root / "hf_student"), str(root / "hf_teacher")
    shapes = {name: ModelShape.of_folder(root / f"hf_{name}") for name in ("student", "teacher")}
    plan = plan_job(config, shapes, Hardware.read(), opener_share=1.0, show=lambda acts: None)
    assert max(stage.peak for stage in plan.stages) == pytest.approx(peak, rel=0.1)

"""The objective's passes as they are compiled for a GPU: their kernels, found out without one, and their values."""

from dataclasses import replace
from functools import partial

import objective_cases as cases
import pytest
import torch
from objective_cases import TOLERANCE, Case
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_tsdkd.objective import ObjectiveConfig, function, observe, passes, tsdkd_loss, tsdkd_loss_from_hidden
from nemo_tsdkd.objective.terms import ForwardKL, JensenShannon, ReverseKL, SoftmaxSums

pytest.importorskip("triton", reason="the extra `compile` is not installed")
import fake_cuda

RULES = {"jsd": JensenShannon(0.9), "forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}
TOKENS, COLUMNS = 110, 76_032  # a tile of 2^23 logits of Qwen's vocabulary at TP 2


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Nothing compiled before, nothing left behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def arguments(of: str, rule: str) -> tuple:
    with FakeTensorMode():
        vector = partial(torch.empty, TOKENS)
        logits = [torch.empty(TOKENS, COLUMNS, dtype=torch.bfloat16) for _ in range(2)]
        softmax = tuple(SoftmaxSums(vector(), vector(), vector()) for _ in range(2))
        temperature = torch.empty((), dtype=torch.float64)
        if of == "softmax":
            return logits[0], temperature
        common = RULES[rule], tuple(logits), softmax, temperature
        if of == "divergence":
            return common
        return *common, torch.empty(TOKENS, 2), vector(), (vector(), vector()), True


@pytest.mark.parametrize(
    ("of", "rule"), [("softmax", "jsd"), *((of, rule) for of in ("divergence", "gradient") for rule in RULES)]
)
def test_each_pass_is_one_kernel_on_an_h100_and_spills_no_register(of, rule):
    compiled = getattr(passes.compiled_passes(ObjectiveConfig(), torch.device("cpu")), of)
    (forms,) = fake_cuda.kernels(compiled, *arguments(of, rule))
    assert forms and all(form.spilled == 0 and form.registers for form in forms), forms


def test_more_kernels_would_be_counted_and_operators_of_others_found():
    with FakeTensorMode():
        x = torch.empty(TOKENS, COLUMNS)
    assert len(fake_cuda.kernels(torch.compile(lambda x: (x.sum(-1), x.exp().sum(0))), x)) > 1
    with pytest.raises(AssertionError, match="sort"):
        fake_cuda.kernels(torch.compile(lambda x: x.exp().sort(-1).values), x)


def compile_passes(monkeypatch) -> None:
    for module in (observe, function):  # forward, backward
        monkeypatch.setattr(module, "passes", passes.compiled_passes)


@pytest.mark.parametrize("name", ["paper", "forward_kl"])
def test_compiled_passes_equal_the_oracle(monkeypatch, name):
    """Within the tolerance of the eager passes in fp32: the compiler reorders sums and fuses a multiply with an add,
    which moves a result by as few ulps as another tile does. Built for the CPU; only the kernels' language differs."""
    compile_passes(monkeypatch)
    case = Case(replace(cases.presets(top_k=4)[name], temperature=0.7), student_padding=3)
    compare(in_tiles(case))
    compare(in_tiles(replace(case, seed=1, steps=11, config=replace(case.config, temperature=1.3))))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3  # one a pass, whatever the number of tokens and the temperature


def in_tiles(case: Case) -> Case:
    """In several tiles, none of a single token, which would be compiled for itself."""
    tokens = int(case.tensors(torch.float32)["mask"].sum())
    rows = next(rows for rows in (7, 6, 5) if tokens % rows != 1)
    assert tokens > rows
    return replace(case, config=replace(case.config, tile_logits=rows * case.vocab_size))


def compare(case: Case) -> None:
    x, width = case.tensors(torch.float32), case.width(1, case.student_padding)
    student = cases.vocab_shard(x["student"], -1, width, 0, 1).requires_grad_()
    out = tsdkd_loss(student, x["teacher"], x["mask"], case.config, vocab_size=case.vocab_size)
    out.loss_sum.backward()
    loss, grad = cases.expected(case, torch.float32)
    assert cases.error(out.loss_sum.detach(), loss) < TOLERANCE[torch.float32]
    assert cases.error(student.grad[..., : case.vocab_size], grad) < TOLERANCE[torch.float32]
    assert not student.grad[..., case.vocab_size :].any()


def test_compiled_passes_of_the_fused_head_equal_the_oracle(monkeypatch):
    compile_passes(monkeypatch)
    case = Case(ObjectiveConfig(preset="reverse_kl", tile_logits=600))
    x, mask = case.hidden(torch.float32), case.tensors(torch.float32)["mask"]
    trained = [x[name].requires_grad_() for name in ("student_hidden", "student_weight")]
    out = tsdkd_loss_from_hidden(**x, response_mask=mask, config=case.config)
    out.loss_sum.backward()
    loss, *grads = cases.expected_from_hidden(case, torch.float32)
    assert cases.error(out.loss_sum.detach(), loss) < TOLERANCE[torch.float32]
    for tensor, grad in zip(trained, grads, strict=True):
        assert cases.error(tensor.grad, grad) < TOLERANCE[torch.float32]
    assert counters["stats"]["unique_graphs"] <= 6  # a second width of tiles makes the columns dynamic


def test_where_passes_are_compiled():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    eager = passes.Passes(passes.softmax_pass, passes.divergence_pass, passes.gradient_pass, 1.0)
    assert passes.passes(ObjectiveConfig(), cpu) == eager
    assert passes.passes(ObjectiveConfig(compile="off"), gpu) == eager

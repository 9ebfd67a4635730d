"""The objective on one rank against the fp64 oracle: every preset, both heads, drawn shapes and masks (logits)."""

from collections import defaultdict
from dataclasses import replace

import objective_cases as cases
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from objective_cases import Case

from nemo_tsdkd.config.schema import PRESETS
from nemo_tsdkd.distributed.vocab_parallel import top_k_by_id
from nemo_tsdkd.objective import ObjectiveConfig, function, observe, tsdkd_loss, tsdkd_loss_from_hidden

CONFIGS = cases.presets(top_k=5)


def logits_call(case: Case, dtype: torch.dtype, **fields):
    """(output, gradient of the student's logits without padding columns, gradient of the padding columns)."""
    x = case.tensors(dtype)
    widths = case.width(1, case.student_padding), case.width(1, case.teacher_padding)
    student, teacher = (
        cases.vocab_shard(x[model], -1, width, 0, 1)
        for model, width in zip(("student", "teacher"), widths, strict=True)
    )
    student.requires_grad_()
    if case.cu_seqlens:
        fields["cu_seqlens"] = torch.tensor(case.cu_seqlens)
    fields |= case.asked() | {"vocab_size": case.vocab_size}
    out = tsdkd_loss(student, teacher, x["mask"], case.config, **fields)
    out.loss_sum.backward()
    return out, student.grad[..., : case.vocab_size], student.grad[..., case.vocab_size :]


def fused_call(case: Case, x: dict[str, torch.Tensor], mask: torch.Tensor):
    """(output, gradients of the student's hidden states and of its weight's true rows, that of the padding rows)."""
    weight, teacher_weight = (
        cases.vocab_shard(x[f"{model}_weight"], 0, case.width(1, padding), 0, 1)
        for model, padding in (("student", case.student_padding), ("teacher", case.teacher_padding))
    )
    hidden, weight = x["student_hidden"].requires_grad_(), weight.requires_grad_()
    bounds = torch.tensor(case.cu_seqlens) if case.cu_seqlens else None
    fields = {"vocab_size": case.vocab_size, "cu_seqlens": bounds, **case.asked()}
    out = tsdkd_loss_from_hidden(hidden, weight, x["teacher_hidden"], teacher_weight, mask, case.config, **fields)
    out.loss_sum.backward()
    return out, hidden.grad, weight.grad[: case.vocab_size], weight.grad[case.vocab_size :]


@st.composite
def drawn_cases(draw) -> Case:
    vocab_size = draw(st.integers(2, 40))
    steps = draw(st.integers(1, 24))
    config = draw(st.sampled_from(list(CONFIGS.values())))
    fields = dict(
        beta=draw(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0])),
        threshold=draw(st.sampled_from([0.03, 0.31, 0.77])),
        entropy_fraction=draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])),
        temperature=draw(st.sampled_from([0.7, 1.0, 3.0])),
        top_k=draw(st.integers(1, vocab_size)),
        tile_logits=draw(st.integers(1, 600)),
    )
    config = replace(config, **fields | PRESETS[config.preset])
    packed = config.preset != "reference" and draw(st.booleans())
    bounds = sorted(draw(st.lists(st.integers(0, steps), max_size=4)))
    return Case(
        config=config,
        steps=steps,
        batch=1 if packed else draw(st.integers(1, 4)),
        vocab_size=vocab_size,
        student_padding=draw(st.integers(0, 3)),
        teacher_padding=draw(st.integers(0, 3)),
        cu_seqlens=(0, *bounds, steps, steps) if packed else None,
        ties=draw(st.booleans()),
        permuted=draw(st.booleans()),
        longest_prompt=draw(st.integers(0, 9)),
        scale=draw(st.sampled_from([0.5, 3.0, 12.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def gradient_scale(case: Case, loss: torch.Tensor) -> torch.Tensor | float:
    """What a gradient's error is measured by, if the gradient is smaller. A KL's gradient is the difference of numbers
    as large as the KL: fp32 cannot know it to more digits than those."""
    nearly_kl = case.config.preset.endswith("_kl") or not 1e-2 < case.config.beta < 1 - 1e-2
    return loss.abs() if nearly_kl else 1e-2


@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@settings(max_examples=300, deadline=None)
@given(case=drawn_cases())
def test_value_and_gradient_equal_the_oracles(dtype, case):
    assume(cases.is_decided(case, dtype))
    out, grad, padding = logits_call(case, dtype)
    loss, expected = cases.expected(case, dtype)
    assert cases.error(out.loss_sum.detach(), loss) < cases.TOLERANCE[dtype]
    assert cases.error(grad, expected, gradient_scale(case, loss)) < cases.TOLERANCE[dtype]
    assert not padding.any()


@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@settings(max_examples=150, deadline=None)
@given(case=drawn_cases())
def test_the_fused_head_equals_the_oracle_for_drawn_logits(dtype, case):
    """The drawn logits, ties and all, are the hidden states of heads whose weight is the identity."""
    assume(cases.is_decided(case, dtype))
    x, unit = case.tensors(dtype), torch.eye(case.vocab_size, dtype=dtype)
    heads = {f"{m}_hidden": x[m] for m in ("student", "teacher")} | {"student_weight": unit, "teacher_weight": unit}
    out, hidden_grad, weight_grad, padding = fused_call(case, heads, x["mask"])
    loss, expected = cases.expected(case, dtype)
    assert cases.error(out.loss_sum.detach(), loss) < cases.TOLERANCE[dtype]
    scale = gradient_scale(case, loss)
    assert cases.error(hidden_grad, expected, scale) < cases.TOLERANCE[dtype]
    products = torch.einsum("sbv,sbh->vh", expected, x["student"].detach().double())
    largest = x["student"].detach().abs().max().clamp(min=1)
    assert cases.error(weight_grad, products, scale * largest) < cases.TOLERANCE[dtype]
    assert not padding.any()


# In bf16 on the same rounded inputs: only gradients are rounded, three times, by 2^-9 each of the largest or more.
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [*cases.TOLERANCE.items(), (torch.bfloat16, 1e-2)], ids=str)
def test_the_fused_head_equals_the_oracle(dtype, tolerance, name):
    case = Case(CONFIGS[name], student_padding=3, teacher_padding=1)
    out, hidden_grad, weight_grad, padding = fused_call(case, case.hidden(dtype), case.tensors(dtype)["mask"])
    loss, expected_hidden, expected_weight = cases.expected_from_hidden(case, dtype)
    assert cases.error(out.loss_sum.detach(), loss) < tolerance
    assert cases.error(hidden_grad, expected_hidden) < tolerance
    assert cases.error(weight_grad, expected_weight) < tolerance
    assert not padding.any()


def test_the_loss_is_the_mean_over_sequences_with_a_response():
    case = Case()
    out, _, _ = logits_call(case, torch.float64)
    assert int(out.num_sequences) == case.batch - 1
    torch.testing.assert_close(out.loss, out.loss_sum / (case.batch - 1))
    weighted = out.direct + case.config.indirect_kd_alpha * out.indirect + case.config.entropy_weight * out.entropy
    torch.testing.assert_close(out.loss.detach(), weighted)
    assert not any(value.requires_grad for value in out.metrics.values())


def test_the_metrics_are_what_the_oracle_sees():
    extra = {"entropy_gap": 0.1, "squared_divergence": 0.0}
    case = Case(ObjectiveConfig(top_k=5, threshold=0.4, extra_terms=extra))
    out, _, _ = logits_call(case, torch.float64)
    x, sums = case.tensors(torch.float64), defaultdict(float)
    for b in range(case.batch - 1):
        z, t = x["student"][x["mask"][:, b], b], x["teacher"][x["mask"][:, b], b]
        h, h_t = oracle.entropy(z.log_softmax(-1)), oracle.entropy(t.log_softmax(-1))
        m = oracle.opener_length(h.tolist(), 0.4)
        kept = 0
        for i in range(m):
            ranking = oracle.teacher_ranking(z[i], t[i], 5)
            kept += sum(bool(z[i, ranking[a]] > z[i, ranking[b]]) for a in range(5) for b in range(a + 1, 5))
        sums["student_entropy"] += h.mean()
        sums["teacher_entropy"] += h_t.mean()
        sums["gate_mean"] += torch.sigmoid(h - h_t).mean()
        for name, term in oracle.sequence_terms(z, t, case.config).items():
            sums[name] += term
        sums["opener_fraction"] += m / len(h)
        sums["rank_agreement"] += kept / (10 * m)
    for name, value in sums.items():
        assert float(out.metrics[name]) == pytest.approx(float(value), rel=1e-12), name
    assert out.metrics.keys() - sums.keys() == {"response_tokens"}
    assert int(out.metrics["response_tokens"]) == int(x["mask"].sum())


@pytest.mark.parametrize("head", ["logits", "fused"])
@pytest.mark.parametrize("name", ["paper", "chosen", "indirect_only", "entropy_only", "gkd", "looking"])
def test_only_tokens_with_weight_are_computed(name, head, monkeypatch):
    """Rows that the divergence sees in the forward and in the backward, and rows that propose candidates. Where a rule
    looks at divergences, these are all rows, once. Nobody looks at sampled tokens."""
    rows: dict[str, set] = {"sums": set(), "grad": set(), "candidates": set()}
    tiles = []
    plain = function.divergence

    def watched(config):
        rule = plain(config)
        sums_, grad_ = rule.sums_, rule.grad_

        def sums(log_s, log_t):
            tiles.append(len(log_s))
            rows["sums"].update(map(tuple, log_s[:, :3].round(decimals=6).tolist()))
            return sums_(log_s, log_t)

        def grad(log_s, log_t, s, sums):
            rows["grad"].update(map(tuple, log_s[:, :3].round(decimals=6).tolist()))
            return grad_(log_s, log_t, s, sums)

        rule.sums_, rule.grad_ = sums, grad
        return rule

    def proposing(student, k):
        rows["candidates"].update(map(tuple, student[:, :3].tolist()))
        return top_k_by_id(student, k)

    monkeypatch.setattr(function, "divergence", watched)
    monkeypatch.setattr(observe, "divergence", watched)
    monkeypatch.setattr(observe, "_logits_at", lambda *args: pytest.fail("the sampled tokens' logits were read"))
    monkeypatch.setattr(function, "top_k_by_id", proposing)
    configs = CONFIGS | {"looking": ObjectiveConfig(gate_rule="prefix", prefix_tokens=2, entropy_rule="tip", top_k=5)}
    case = Case(replace(configs[name], tile_logits=100_000))
    if head == "logits":
        out, *_ = logits_call(case, torch.float64)
        x = case.tensors(torch.float64)["student"]
    else:
        x = case.hidden(torch.float64)
        out, *_ = fused_call(case, x, case.tensors(torch.float64)["mask"])
        x = x["student_hidden"].detach() @ x["student_weight"].T
    config, mask = case.config.resolved(), case.tensors(torch.float64)["mask"]
    openers = chosen = first = 0
    for b in range(case.batch - 1):
        h = oracle.entropy((x[mask[:, b], b] / config.temperature).log_softmax(-1)).tolist()
        openers += oracle.opener_length(h, config.threshold)
        chosen += len(oracle.uncertain_positions(h, config.entropy_fraction))
        first += min(2, len(h))
    n = int(mask.sum())
    compared = {"paper": n, "gkd": n, "chosen": chosen, "looking": first}.get(name, 0)
    assert len(rows["sums"]) == sum(tiles) == (n if name == "looking" else compared)
    if name == "looking":  # the backward reads the teacher for all tokens with a gradient
        assert first < len(rows["grad"]) < n
        return
    assert len(rows["candidates"]) == (openers if config.indirect_kd_alpha else 0)
    assert compared <= len(rows["grad"]) <= (compared and compared + openers)
    terms = {"direct": config.direct_weight, "indirect": config.indirect_kd_alpha, "entropy": config.entropy_weight}
    for term, weight in terms.items():
        assert (getattr(out, term) is None) == (term not in out.metrics) == (weight == 0)


def test_without_any_response_the_loss_and_its_gradient_are_zero():
    case = Case(batch=1, steps=6, cu_seqlens=(0, 0, 6))
    out, grad, _ = logits_call(case, torch.float32)
    assert out.loss == 0 and out.num_sequences == 0 and not grad.any()


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(reduction):
    """Micro-batches with unequal numbers of responses, or all sequences packed into one row."""
    case = Case(ObjectiveConfig(reduction=reduction), batch=4, ties=True)
    whole, grad, _ = logits_call(case, torch.float64)
    x = case.tensors(torch.float64)
    student = x["student"].clone().requires_grad_()
    outs = [tsdkd_loss(student[:, b], x["teacher"][:, b], x["mask"][:, b], case.config) for b in ([0], [1, 2], [3])]
    sum(out.loss_sum for out in outs).backward()
    torch.testing.assert_close(student.grad, grad, rtol=0, atol=1e-14)
    assert sum(out.num_sequences for out in outs) == whole.num_sequences
    assert sum(out.count for out in outs) == whole.count
    torch.testing.assert_close(whole.loss, whole.loss_sum / whole.count)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(out.metrics[name] for out in outs), value)

    row = x["student"].transpose(0, 1).reshape(1, -1, case.vocab_size).transpose(0, 1).requires_grad_()
    teacher = x["teacher"].transpose(0, 1).reshape(-1, 1, case.vocab_size)
    bounds = torch.arange(case.batch + 1) * case.steps
    packed = tsdkd_loss(row, teacher, x["mask"].T.reshape(-1, 1), case.config, cu_seqlens=bounds)
    torch.testing.assert_close(packed.loss_sum, whole.loss_sum)


def test_overwriting_the_logits_gives_the_same_gradient_once():
    case = Case(student_padding=2)
    _, grad, padding = logits_call(case, torch.float64)
    x = case.tensors(torch.float64)
    logits = cases.vocab_shard(x["student"], -1, case.width(1, 2), 0, 1)
    student = logits.clone().requires_grad_()
    fields = {"vocab_size": case.vocab_size, "overwrite_student_logits": True}
    out = tsdkd_loss(student, x["teacher"], x["mask"], case.config, **fields)
    out.loss_sum.backward(retain_graph=True)
    assert student.grad.data_ptr() == student.data_ptr()
    assert torch.equal(student.grad, torch.cat([grad, padding], -1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss_sum.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_logits_changed_before_the_backward_are_an_error_not_a_wrong_gradient(dtype):
    x = Case().tensors(dtype)
    loss = tsdkd_loss(x["student"].requires_grad_(), x["teacher"], x["mask"], ObjectiveConfig()).loss
    x["teacher"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_backward_lets_go_of_both_models_tensors():
    """Megatron keeps a micro-batch's loss until the next one's is there."""
    x = Case().tensors(torch.float32)
    loss = tsdkd_loss(x["student"].requires_grad_(), x["teacher"], x["mask"], ObjectiveConfig()).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = loss.grad_fn.next_functions[0][0].saved_tensors


def test_a_transposed_batch_first_view_is_accepted():
    case = Case()
    _, grad, _ = logits_call(case, torch.float64)
    x = case.tensors(torch.float64)
    student = x["student"].transpose(0, 1).contiguous().requires_grad_()
    tsdkd_loss(student.transpose(0, 1), x["teacher"], x["mask"], case.config).loss_sum.backward()
    assert torch.equal(student.grad.transpose(0, 1), grad)

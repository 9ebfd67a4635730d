"""The objective against dense PyTorch and Liger-Kernel: peak extra memory and time of forward and backward.

    python benchmarks/loss.py [--tokens 256 512 1024] [--dtypes float32 bfloat16] [--json FILE]

Every figure comes from a process of its own: inputs first, a small warm-up, then the peak of the resident set above
what it was (Linux resets and reports it), the returned gradient included, and the fastest of `--repeats` runs.
`dense` is the `reference` preset as one writes it in PyTorch; `dense+head` starts from hidden states as the fused
head does. Memory is in multiples of one logits tensor [tokens, V]; the fused rows leave the gradient of the head's
weight out, which any head returns. `on n %` is the direct term on a share of the tokens. Liger-Kernel has only the
JSD: compare its row with our `gkd` preset.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

VOCAB_SIZE = 152_064  # Qwen2.5's padded vocabulary
HIDDEN = {"student": 128, "teacher": 256}  # small, so that the loss and not the head's products is timed


def dense_loss(student, teacher, mask):
    """The public trainer's loss (docs/math.md, preset reference) on logits [B, S, V], by autograd."""
    import torch

    beta, share, alpha, k = 0.9, 0.1, 0.1, 10
    student, teacher = student.float(), teacher.float()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    entropy_s, entropy_t = (-(log_p.exp() * log_p).sum(-1) for log_p in (log_s, log_t))
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    jsd = beta * (log_t.exp() * (log_t - log_m)).sum(-1) + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1)
    direct = (torch.sigmoid(entropy_s - entropy_t).detach() * jsd)[mask].mean()
    h = entropy_s.detach()[mask]
    entropy = entropy_s[entropy_s.detach() >= torch.quantile(h, share)].mean()
    columns = int((h.cumsum(0) < share * h.sum()).sum())
    candidates = student[:, :columns].topk(k).indices
    ranking = teacher[:, :columns].gather(-1, candidates).sort(-1, descending=True).indices
    ranked = student[:, :columns].gather(-1, candidates.gather(-1, ranking))
    indirect = (ranked.logcumsumexp(-1) - ranked).sum(-1)[mask[:, :columns]].mean()
    return direct + entropy + alpha * indirect


def logits_inputs(tokens: int, dtype):
    import torch

    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(tokens, 1, VOCAB_SIZE, generator=g, dtype=dtype).mul_(3) for _ in range(2))
    return student.requires_grad_(), teacher, torch.ones(tokens, 1, dtype=torch.bool)


def hidden_inputs(tokens: int, dtype):
    import torch

    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(tokens, 1, size, generator=g).to(dtype) for size in HIDDEN.values()]
    weights = [torch.randn(VOCAB_SIZE, size, generator=g).mul_(3 / size**0.5).to(dtype) for size in HIDDEN.values()]
    student = hidden[0].requires_grad_(), weights[0].requires_grad_()
    return *student, hidden[1], weights[1], torch.ones(tokens, 1, dtype=torch.bool)


def ours(**fields) -> Callable:
    from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss

    overwrite = fields.pop("overwrite_student_logits", False)
    config = ObjectiveConfig(**fields)
    return lambda *inputs: tsdkd_loss(*inputs, config, overwrite_student_logits=overwrite).loss


def ours_fused(**fields) -> Callable:
    from nemo_tsdkd.objective import ObjectiveConfig, tsdkd_loss_from_hidden

    config = ObjectiveConfig(head="fused", **fields)
    return lambda *inputs: tsdkd_loss_from_hidden(*inputs, config).loss


def dense() -> Callable:
    return lambda student, teacher, mask: dense_loss(student.transpose(0, 1), teacher.transpose(0, 1), mask.T)


def dense_head() -> Callable:
    def loss(student, student_weight, teacher, teacher_weight, mask):
        logits = student @ student_weight.T, (teacher @ teacher_weight.T).detach()
        return dense()(*logits, mask)

    return loss


def liger() -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.9, compiled=False, chunk_size=64)

    def loss(student, student_weight, teacher, teacher_weight, mask):
        return jsd(student[:, 0], student_weight, teacher[:, 0], teacher_weight, mask[:, 0].long())

    return loss


# The direct term alone, on a share of the tokens: what a rule that chooses saves.
DIRECT = {"gate_rule": "top_fraction", "indirect_kd_alpha": 0.0, "entropy_weight": 0.0}
# name: (inputs, loss, what it is compared with)
ROWS = {
    "dense reference": (logits_inputs, dense, None),
    "ours reference": (logits_inputs, lambda: ours(preset="reference"), "dense reference"),
    "ours paper": (logits_inputs, ours, "dense reference"),
    "ours paper, in place": (logits_inputs, lambda: ours(overwrite_student_logits=True), "dense reference"),
    **{
        f"{name} on {percent} %": (inputs, partial(make, **DIRECT, entropy_fraction=percent / 100), whole)
        for name, inputs, make in (("logits", logits_inputs, ours), ("fused", hidden_inputs, ours_fused))
        for percent, whole in ((100, None), (50, f"{name} on 100 %"), (10, f"{name} on 100 %"))
    },
    "dense+head reference": (hidden_inputs, dense_head, None),
    "ours fused reference": (hidden_inputs, lambda: ours_fused(preset="reference"), "dense+head reference"),
    "ours fused paper": (hidden_inputs, ours_fused, "dense+head reference"),
    "Liger JSD": (hidden_inputs, liger, None),
    "ours fused gkd": (hidden_inputs, lambda: ours_fused(preset="gkd"), "Liger JSD"),
}


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def measure(name: str, tokens: int, dtype_name: str, threads: int, repeats: int) -> dict:
    """Peak extra bytes and seconds of one row, in this process."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    make_inputs, make_loss, _ = ROWS[name]
    loss = make_loss()
    loss(*make_inputs(32, dtype)).backward()
    inputs = make_inputs(tokens, dtype)
    seconds, peak = [], 0
    for _ in range(repeats):
        for tensor in inputs:
            tensor.grad = None
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        start = time.perf_counter()
        value = loss(*inputs)
        value.backward()
        seconds.append(time.perf_counter() - start)
        peak = max(peak, resident("VmHWM") - before)
    weight_grad = 0 if make_inputs is logits_inputs else inputs[1].nbytes
    return {"loss": float(value.detach()), "seconds": min(seconds), "extra_bytes": peak - weight_grad}


def run(name: str, tokens: int, dtype: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--row", name, "--tokens", str(tokens), "--dtypes", dtype]
    command += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {tokens} tokens, {dtype}:\n{done.stderr[-2000:]}")
    logits_bytes = tokens * VOCAB_SIZE * (4 if dtype == "float32" else 2)
    measured = json.loads(done.stdout.splitlines()[-1])
    row = {"row": name, "tokens": tokens, "dtype": dtype, **measured}
    return row | {"extra_logits": measured["extra_bytes"] / logits_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--row", choices=ROWS, help="measure this row in this process and print JSON")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args.tokens[0], args.dtypes[0], args.threads, args.repeats)))
        return
    print(f"V = {VOCAB_SIZE}, {args.threads} threads, fastest of {args.repeats}; extra: peak over one logits tensor")
    print(f"{'':22}{'tokens':>7}{'dtype':>10}{'extra':>8}{'MiB':>8}{'seconds':>9}{'faster than':>32}")
    rows: dict[tuple, dict] = {}
    for dtype in args.dtypes:
        for tokens in args.tokens:
            for name, (_, _, other) in ROWS.items():
                row = rows[name, tokens, dtype] = run(name, tokens, dtype, args)
                against = ""
                if other:
                    row["compared_with"] = other
                    row["times_faster"] = rows[other, tokens, dtype]["seconds"] / row["seconds"]
                    against = f"{other} {row['times_faster']:.1f} x"
                figures = f"{row['extra_logits']:8.2f}{row['extra_bytes'] / 2**20:8.0f}{row['seconds']:9.2f}"
                print(f"{name:22}{tokens:7}{dtype:>10}{figures}{against:>32}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(list(rows.values()), file, indent=1)


if __name__ == "__main__":
    main()

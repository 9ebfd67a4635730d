"""Runs in a copy of the package to which all recipes of CONTRIBUTING.md are applied; prints what it sees as JSON.

One process for all: it imports the whole stack.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from nemo_tsdkd.checkpoints.model_folder import is_nemo_checkpoint, require_importable
from nemo_tsdkd.cli.convert import import_main
from nemo_tsdkd.config.compose import compose_config
from nemo_tsdkd.config.validation import UserError
from nemo_tsdkd.objective import Metrics, ObjectiveConfig, tsdkd_loss
from nemo_tsdkd.reporting.metrics import REQUIRED
from nemo_tsdkd.verifiers.judge import judge_all

PATHS = ["run_dir=run", "student.path=s", "teacher.path=t", "data.path=d.jsonl"]


def loss(**fields):
    """(output, gradient, student logits, teacher logits) of 16 response tokens in fp64."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(16, 1, 11, generator=g, dtype=torch.float64) for _ in range(2))
    config, labels = ObjectiveConfig(top_k=3, **fields), torch.arange(16)[:, None] % 11
    out = tsdkd_loss(student.requires_grad_(), teacher, torch.ones(16, 1), config, labels=labels)
    out.loss.backward()
    return out, student.grad, student, teacher


def against_autograd(definition, **fields):
    """[value, expected value, largest error of the gradient] of a term by itself."""
    out, grad, student, teacher = loss(indirect_kd_alpha=0.0, entropy_weight=0.0, gate_rule="identity", **fields)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = definition(log_s, log_t).mean()
    (expected_grad,) = torch.autograd.grad(expected, student)
    return [float(out.loss), float(expected), float((grad - expected_grad).abs().max())]


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def refusal(call, *args):
    try:
        call(*args)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def main(models: Path) -> dict:
    out, _, _, teacher = loss(opener_rule="surprising", extra_terms={"entropy_gap": 0.1})
    plain, *_ = loss()
    seen = {
        "opener_fraction": float(out.metrics["opener_fraction"]),
        "unlikely": [float(teacher[i, 0].softmax(-1)[i % 11]) < 1 / 8 for i in range(16)],
        "reported": sorted(out.metrics.keys() - plain.metrics.keys() | {"divergence"} & plain.metrics.keys()),
        "required": "divergence" in Metrics._fields and "divergence" in REQUIRED,
        "half_square": against_autograd(
            lambda log_s, log_t: (log_s.exp() - log_t.exp()).square().sum(-1) / 2, divergence="half_square"
        ),
        "entropy_gap": against_autograd(
            lambda log_s, log_t: (entropy(log_s) - entropy(log_t)).square(),
            direct_weight=0.0,
            extra_terms={"entropy_gap": 1.0},
        ),
        "refused": refusal(compose_config("train", [*PATHS, "optim.adam_eps=0"]).validate),
    }
    verdicts = judge_all("ends_with", ["so it is 7", "7 it is", ""], ["7"] * 3)
    seen["ends_with"] = [(verdict.correct, verdict.answer, verdict.error) for verdict in verdicts]
    other = models / "sliding"
    shutil.copytree(models / "mistral", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    seen["sliding"] = refusal(require_importable, other)
    import_main(["--source", str(models / "mistral"), "--output", str(models / "nemo")])
    seen["imported"] = is_nemo_checkpoint(models / "nemo")

    from nemo_tsdkd.megatron.train import build_optimizer  # with NeMo

    seen["adam_eps"] = build_optimizer(compose_config("train", [*PATHS, "optim.adam_eps=1e-6"])).config.adam_eps
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))

"""Cases for the objective and the way a layout cuts them, shared by the unit and the multi-rank tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import oracle
import torch
from torch import Tensor

from nemo_tsdkd.config.schema import TILE_LOGITS
from nemo_tsdkd.objective import ObjectiveConfig
from nemo_tsdkd.objective.extra_terms import TokenStatistics, term
from nemo_tsdkd.objective.terms import DIVERGENCES


@term("entropy_gap")
def entropy_gap(seen: TokenStatistics, config: ObjectiveConfig) -> Tensor:
    return (seen.student_entropy - seen.teacher_entropy).square()


@term("squared_divergence")
def squared_divergence(seen: TokenStatistics, config: ObjectiveConfig) -> Tensor:
    return seen.divergence.square()


@DIVERGENCES.register("half_square")
class HalfSquare:
    """sum_v (s_v - t_v)^2 / 2."""

    def __init__(self, config: ObjectiveConfig) -> None:
        pass

    def sums_(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        s, gap = log_s.exp(), log_s.exp() - log_t.exp()
        return torch.stack([gap.square().sum(-1), (s * gap).sum(-1)])

    def value(self, sums: Tensor) -> Tensor:
        return sums[0] / 2

    def grad_(self, log_s: Tensor, log_t: Tensor, s: Tensor, sums: Tensor) -> Tensor:
        return (s - log_t.exp() - sums[1].unsqueeze(-1)) * s


TILE_LOGITS["cpu"] = 4 * 41  # four tokens of a Case: these sizes too must fall into several tiles
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
GARBAGE = 60.0  # fills padding columns, so that one that leaks would rule the softmax


@dataclass(frozen=True)
class Case:
    """Sizes, paddings and settings; tensors come from `seed`."""

    config: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    steps: int = 16
    batch: int = 3
    vocab_size: int = 41
    student_padding: int = 0  # columns a rank's shard has beyond the smallest even share
    teacher_padding: int = 0
    cu_seqlens: tuple[int, ...] | None = None
    ties: bool = False  # logits on a coarse grid: many equal scores
    permuted: bool = False  # the student's rows hold the same logits in another order: all entropies are equal
    scale: float = 3.0
    longest_prompt: int = 4  # rows before a response, drawn for each sequence of a batch
    student_size: int = 5  # hidden sizes, for the fused head
    teacher_size: int = 7
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """student, teacher [S, B, V]; mask [S, B]: ragged responses, and none in the last row of several; labels
        [S, B], which are no token ids outside of the responses; keys, one for each sequence."""
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.steps, self.batch, self.vocab_size)
        student, teacher = (self.scale * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
        if self.permuted:
            order = torch.rand(shape, generator=g).argsort(-1)
            student = student[:1, :1].expand(shape).gather(-1, order)
        if self.ties:
            student, teacher = student.round(), teacher.round()
        mask = torch.rand(self.steps, self.batch, generator=g) < 0.6
        begin = torch.randint(0, min(self.longest_prompt, self.steps - 1) + 1, (self.batch,), generator=g)
        step = torch.arange(self.steps).unsqueeze(-1)
        mask = mask & (step > begin) | (step == begin)
        if self.batch > 1:
            mask[:, -1] = False
        if self.cu_seqlens:
            mask[self.cu_seqlens[-2] :] = False
        labels = torch.randint(0, self.vocab_size, mask.shape, generator=g).masked_fill(~mask, -100)
        sequences = len(self.cu_seqlens) - 1 if self.cu_seqlens else self.batch
        keys = torch.randint(-(2**62), 2**62, (sequences,), generator=g)
        models = {"student": student.to(dtype), "teacher": teacher.to(dtype)}
        return models | {"mask": mask, "labels": labels, "keys": keys}

    def asked(self, rows: slice | Tensor = slice(None)) -> dict[str, Tensor]:
        """What rules may look at, as the loss takes it, of some rows of a call."""
        x = self.tensors(torch.float64)
        return {"labels": x["labels"][rows], "sequence_keys": x["keys"]}

    def hidden(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Hidden states [S, B, H] and weights [V, H] of both models."""
        g = torch.Generator().manual_seed(self.seed + 1)

        def draw(*shape):
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

        sizes = {"student": self.student_size, "teacher": self.teacher_size}
        drawn = {f"{m}_hidden": draw(self.steps, self.batch, size) for m, size in sizes.items()}
        return drawn | {f"{m}_weight": draw(self.vocab_size, size) for m, size in sizes.items()}

    def width(self, tp: int, padding: int) -> int:
        return math.ceil(self.vocab_size / tp) + padding


def vocab_shard(full: Tensor, dim: int, width: int, rank: int, tp: int) -> Tensor:
    """Rank's columns of `full` padded with garbage to tp * width."""
    shape = list(full.shape)
    shape[dim] = tp * width - shape[dim]
    return torch.cat([full, full.new_full(shape, GARBAGE)], dim).narrow(dim, rank * width, width).contiguous()


def sequence_shard(steps: int, cu_seqlens: tuple[int, ...] | None, rank: int, cp: int) -> Tensor:
    """Row indices that a context-parallel rank holds: of each sequence one chunk from the front, one from the back."""
    rows: list[int] = []
    bounds = cu_seqlens or (0, steps)
    for first, end in pairwise(bounds):
        chunk = (end - first) // (2 * cp)
        for part in (rank, 2 * cp - 1 - rank):
            rows += range(first + part * chunk, first + (part + 1) * chunk)
    return torch.tensor(rows) if cp > 1 else torch.arange(steps)


def expected(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The oracle's loss_sum and gradient [S, B, V] for the case's logits."""
    x = case.tensors(dtype)
    student = x["student"].double().requires_grad_()
    cu = list(case.cu_seqlens) if case.cu_seqlens else None
    asked = x["labels"], x["keys"]
    loss = oracle.loss_sum(student, x["teacher"], x["mask"], case.config, case.vocab_size, cu, *asked)
    loss.backward()
    return loss.detach(), student.grad


def expected_from_hidden(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle's loss_sum and its gradients for the student's hidden states and weight."""
    x = {name: value.double() for name, value in case.hidden(dtype).items()}
    hidden, weight = x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_()
    teacher = x["teacher_hidden"] @ x["teacher_weight"].T
    cu = list(case.cu_seqlens) if case.cu_seqlens else None
    mask, labels, keys = (case.tensors(dtype)[name] for name in ("mask", "labels", "keys"))
    loss = oracle.loss_sum(hidden @ weight.T, teacher, mask, case.config, case.vocab_size, cu, labels, keys)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def error(value: Tensor, target: Tensor, scale: Tensor | float = 1e-2) -> float:
    """Largest difference, relative to the target's largest entry or to `scale`, whichever is larger.

    The least scale is 1e-2: a softmax's sum is one, known to an ulp, so that an entropy or a probability far below
    one has no more digits than that leaves it.
    """
    assert value.shape == target.shape, (value.shape, target.shape)
    if not target.numel():
        return 0.0
    return float((value.double() - target).abs().max()) / max(float(target.abs().max()), float(scale), 1e-2)


def is_decided(case: Case, dtype: torch.dtype) -> bool:
    """Whether rounding in `dtype` cannot turn a choice: no entropy or running sum lies at the edge of what counts as
    equal to the deciding one. Equal ones, which logits on a grid make likely, lie well inside."""
    x, c = case.tensors(dtype), case.config
    h = oracle.entropy((x["student"].double() / c.temperature).log_softmax(-1))
    rounded = oracle.entropy((x["student"] / c.temperature).double().log_softmax(-1))
    if not bool((rounded - h).abs().max() < oracle.SLACK / 4):
        return False
    if c.preset == "reference":
        chosen = h[x["mask"]]
        q = torch.quantile(chosen, c.threshold)
        edges = [(h - q + oracle.SLACK * (1 + q)).abs().min() / (1 + q)]
        sequences = [h.T[x["mask"].T]]
    else:
        bounds = case.cu_seqlens or (0, case.steps)
        spans = [slice(*span) for span in pairwise(bounds)]
        sequences = [h[s, b][x["mask"][s, b]] for s in spans for b in range(case.batch)]
        sequences = [q for q in sequences if len(q)]
        edges = []
        for q in sequences:
            if count := len(oracle.uncertain_positions(q.tolist(), c.entropy_fraction)):
                least = q.sort(descending=True).values[count - 1]
                edges.append(((q - least).abs() / (1 + least) - oracle.SLACK).abs().min())
    if "tip" in (c.gate_rule, c.opener_rule, c.entropy_rule):
        edges += tip_edges(case, dtype)
    for q in sequences:
        sums = q.cumsum(0)[:-1] - c.threshold * q.sum()  # the last sum is the whole: no choice hangs on it
        edges += [(sums / (q.sum() + len(q)) + oracle.SLACK).abs().min()] if len(sums) else []
    return all(bool(edge > oracle.SLACK / 4) for edge in edges)


def tip_edges(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """How far, in units of SLACK, scores and spreads lie from the edge of what counts as equal; -1 where rounding moves
    a divergence too far."""
    x, c, edges = case.tensors(dtype), case.config, []
    logs = [[(z / c.temperature).double().log_softmax(-1) for z in (x["student"], x["teacher"])]]
    logs += [[(x[model].double() / c.temperature).log_softmax(-1) for model in ("student", "teacher")]]
    rounded, exact = (oracle.jsd(*pair, c.beta) for pair in logs)
    if not bool(((rounded - exact).abs() < oracle.SLACK / 4 * (1 + exact)).all()):
        return [torch.tensor(-1.0)]
    entropy, bounds = oracle.entropy(logs[1][0]), case.cu_seqlens or (0, case.steps)
    for first, end in pairwise(bounds):
        for b in range(case.batch):
            mine = x["mask"][first:end, b]
            h, d = entropy[first:end, b][mine].tolist(), exact[first:end, b][mine].tolist()
            if not h:
                continue
            most = sorted(h)[math.ceil(0.98 * len(h)) - 1]
            for values in ([min(v, most) for v in h], d):
                noise = 2 * (1 + max(values))
                edges.append(torch.tensor(abs((max(values) - min(values)) / noise - oracle.SLACK)))
            score, margin = oracle.tip_scores(h, d)
            if margin:
                least = sorted(score)[-math.ceil(c.tip_fraction * len(h) - 1e-9)]
                edges += [torch.tensor(abs(abs(v - least) / margin - 1) * oracle.SLACK) for v in score]
    return edges


def presets(**fields) -> dict[str, ObjectiveConfig]:
    """Every preset and every edge of its fields, by name."""
    configs = {
        "paper": {},
        "reference": {"preset": "reference", "threshold": 0.4},
        "gkd": {"preset": "gkd", "beta": 0.5},
        "forward_kl": {"preset": "forward_kl"},
        "reverse_kl": {"preset": "reverse_kl"},
        "beta_0": {"beta": 0.0},
        "beta_1": {"beta": 1.0},
        "warm": {"temperature": 2.5, "gate_temperature": 0.3},
        "indirect_only": {"direct_weight": 0.0, "entropy_weight": 0.0, "threshold": 0.7},
        "entropy_only": {"direct_weight": 0.0, "indirect_kd_alpha": 0.0, "entropy_fraction": 0.55},
        "chosen": {"gate_rule": "top_fraction", "entropy_fraction": 0.3, "threshold": 0.4},
        "by_token": {"reduction": "token", "threshold": 0.4},
        "tip": {"gate_rule": "tip", "opener_rule": "tip", "entropy_rule": "random_share", "tip_fraction": 0.4},
        "drift": {"gate_rule": "importance_weight", "opener_rule": "prefix", "prefix_tokens": 3, "temperature": 1.3},
        "sampled": {
            "gate_rule": "random_share",
            "random_fraction": 0.4,
            "entropy_rule": "importance_weight",
            "beta": 1.0,
        },
        "whole": {"threshold": 1.0, "entropy_fraction": 1.0, "top_k": 1},
        "registered": {"divergence": "half_square", "extra_terms": {"entropy_gap": 0.3, "squared_divergence": 0.2}},
    }
    return {name: ObjectiveConfig(**{**fields, **given}) for name, given in configs.items()}

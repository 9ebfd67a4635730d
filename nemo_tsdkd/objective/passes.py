"""The objective's passes over tiles of logits, as functions of tensors: called as they are, or compiled for CUDA.

Compiled, each is one kernel: it reads the logits in their own dtype and keeps everything between them and its result
in registers, where the eager operators write a tile of fp32 numbers each. Shapes: n tokens, V columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_tsdkd.config.schema import ObjectiveConfig
from nemo_tsdkd.objective.terms import FLOOR, Divergence, SoftmaxSums, add_entropy_grad_


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_(z: Tensor, temperature: float | Tensor) -> Tensor:
    """A tile's logits as the formulas read them: in fp32 (fp64 where they are), divided, without -inf.

    May overwrite z. A compiled function must not, or it writes to memory what no one reads: hence the copy there,
    which stays in registers. A temperature in a tensor always divides, for its value must not be compiled in.
    """
    z = z.to(compute_dtype(z.dtype), copy=torch.compiler.is_compiling())
    if isinstance(temperature, Tensor) or temperature != 1:
        z.div_(temperature)
    return z.clamp_(min=FLOOR)


def softmax_pass(logits: Tensor, temperature: float | Tensor) -> SoftmaxSums:
    """Softmax sums [n] of one model's logits [n, V]."""
    return SoftmaxSums.of_(scaled_(logits, temperature))


def divergence_pass(
    rule: Divergence,
    logits: tuple[Tensor, ...],
    softmax: tuple[SoftmaxSums, ...],
    temperature: float | Tensor,
) -> Tensor:
    """The divergence's sums [2, n] of the student's and the teacher's logits [n, V]; softmax sums [n] of each."""
    return rule.sums_(*_log_probabilities(logits, softmax, temperature))


def gradient_pass(
    rule: Divergence,
    logits: tuple[Tensor, ...],
    softmax: tuple[SoftmaxSums, ...],
    temperature: float | Tensor,
    sums: Tensor | None,
    direct: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
    skips: bool,
) -> Tensor:
    """direct * d divergence / dz + weight * dH/dz, [n, V], z the student's logits over the temperature.

    Args:
        logits, softmax: of the student, and of the teacher where there are sums.
        sums: the divergence's, [n, 2] over the whole vocabulary; None where no token has a divergence.
        direct: weight [n] of the divergence.
        entropy: the student's entropy and its weight, [n] each; None where no token has that weight.
        skips: some tokens' sums mean nothing; their `direct` is zero.
    """
    logs = _log_probabilities(logits, softmax, temperature)
    log_s, s = logs[0], logs[0].exp()
    if sums is None:
        grad = torch.zeros_like(s)
    else:
        weight = direct.unsqueeze(-1)
        grad = rule.grad_(log_s, logs[1], s, sums.T).mul_(weight)
        if skips:  # whatever the formula gives without sums
            grad.masked_fill_(weight == 0, 0)
    if entropy is not None:
        value, weight = entropy
        add_entropy_grad_(grad, log_s, s, value.unsqueeze(-1), weight.unsqueeze(-1))
    return grad


def _log_probabilities(
    logits: tuple[Tensor, ...], softmax: tuple[SoftmaxSums, ...], temperature: float | Tensor
) -> list[Tensor]:
    pairs = zip(logits, softmax, strict=True)
    return [sums.log_probabilities_(scaled_(z, temperature)) for z, sums in pairs]


class Passes(NamedTuple):
    """How a call runs its passes: the three functions above, and the temperature as they take it."""

    softmax: Callable[..., SoftmaxSums]
    divergence: Callable[..., Tensor]
    gradient: Callable[..., Tensor]
    temperature: float | Tensor


def passes(config: ObjectiveConfig, device: torch.device) -> Passes:
    """Compiled on CUDA unless `objective.compile` is off; elsewhere as they are."""
    if config.compile == "off" or device.type != "cuda":
        return Passes(softmax_pass, divergence_pass, gradient_pass, config.temperature)
    return compiled_passes(config, device)


def compiled_passes(config: ObjectiveConfig, device: torch.device) -> Passes:
    # fp64, so that fp64 logits keep their digits; a 0-dim tensor widens no other. Filled on the device, never read.
    temperature = torch.full((), config.temperature, dtype=torch.float64, device=device)
    return Passes(_compiled(softmax_pass), _compiled(divergence_pass), _compiled(gradient_pass), temperature)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by `torch.compile`, once for all numbers of tokens.

    Every tensor's first dimension counts tokens and is marked dynamic. The columns of a tile are compiled in, since
    most runs have one width and its kernel may load more at a time; torch makes them dynamic when a second width
    comes. A tile of a single token is a case of its own, as torch has it. A row's columns are not split over programs:
    torch would split them by the first tile's size and add kernels.
    """
    inner = torch.compile(function, options={"split_reductions": False})

    def prepared(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            value = value.contiguous()  # a stride compiled in would be a shape compiled in
            torch._dynamo.maybe_mark_dynamic(value, 0)
        elif isinstance(value, SoftmaxSums):
            return SoftmaxSums(*map(prepared, value))
        elif isinstance(value, tuple):
            return tuple(map(prepared, value))
        return value

    return lambda *args: inner(*map(prepared, args))

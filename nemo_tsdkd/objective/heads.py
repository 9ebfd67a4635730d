"""Where logits come from, tile by tile: from logits tensors, or from hidden states and head weights.

A head knows n tokens and a rank's columns, hands out tiles of both models' logits as they are (passes.py makes them
fp32 or wider and divides them by the temperature), and takes tiles of gradient back. One tile of each kind exists at
a time; the objective sees nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_tsdkd.distributed.vocab_parallel import Overlap
from nemo_tsdkd.objective.passes import compute_dtype

Tile = tuple[slice, slice, Tensor]  # tokens, columns, values [tokens, columns]
LogitsTile = tuple[slice, slice, list[Tensor]]  # the same with the student's and, if asked for, the teacher's logits
_WIDE = 64  # columns of a tile come in multiples of it: a Hopper GEMM's rows begin at multiples of 16 bytes


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


@dataclass(frozen=True, kw_only=True)
class LogitsHead:
    """Both models' logits as tensors [N, V_local]; tiles are runs of tokens over all columns.

    Attributes:
        student, teacher: logits; the student's may be overwritten by its gradient (`overwrite`).
        left, right: the teacher's columns [n, c] that other ranks hold (vocab_parallel.Overlap).
        index: which n of the N rows are the head's tokens.
        tile_logits: logits of one model in a tile.
    """

    student: Tensor
    teacher: Tensor
    left: Tensor
    right: Tensor
    index: Tensor
    overlap: Overlap
    tile_logits: int
    overwrite: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.index)

    @property
    def padded_width(self) -> int:
        return self.student.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the backward needs again, the differentiable ones first."""
        return self.student, self.teacher, self.left, self.right

    def bind(self, student: Tensor, teacher: Tensor, left: Tensor, right: Tensor) -> LogitsHead:
        return replace(self, student=student, teacher=teacher, left=left, right=right)

    def take(self, index: Tensor) -> LogitsHead:
        """The same head for some of its tokens."""
        return replace(self, index=self.index[index], left=self.left[index], right=self.right[index])

    def tiles(self, teacher: bool = True) -> Iterator[LogitsTile]:
        """Runs of tokens over all true columns; the caller may overwrite them."""
        width, (first, end) = self.overlap.width, self.overlap.own
        for rows in _spans(self.num_tokens, max(1, self.tile_logits // width)) if width else ():
            models = [self.student[:, :width].index_select(0, self.index[rows])]
            if teacher:
                own = self.teacher[:, first:end].index_select(0, self.index[rows])
                moved = self.left.shape[1] + self.right.shape[1]
                models.append(torch.cat([self.left[rows], own, self.right[rows]], -1) if moved else own)
            yield rows, slice(0, width), models

    def backward(self, gradient: Iterator[Tile]) -> tuple[Tensor, ...]:
        """d loss / d student logits; zero for padding columns and for rows that are not this head's tokens."""
        grad = self.student.detach() if self.overwrite else torch.zeros_like(self.student)
        for rows, columns, tile in gradient:
            grad[:, columns].index_copy_(0, self.index[rows], tile.to(grad.dtype))
        if self.overwrite:
            others = torch.ones(len(grad), dtype=torch.bool, device=grad.device)
            others[self.index] = False
            grad[others] = 0
            grad[:, self.overlap.width :] = 0
        return (grad,)

    def spread(self, grads: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        """This head's gradients from those of `take(index)`."""
        return grads


@dataclass(frozen=True, kw_only=True)
class FusedHead:
    """Hidden states [n, H] and vocabulary-sharded weights [V_local, H] of both models.

    Tiles are runs of columns over all tokens, so that each weight is read once a pass and each row of the weight's
    gradient is one matrix product. Logits are never rounded to the weights' dtype, gradients are.

    Attributes:
        student, teacher: hidden states; teacher's width may differ.
        student_weight: [V_local, H_s]; columns beyond the true vocabulary are not read and get no gradient.
        teacher_weight: pieces [c, H_t] that in order match the student's columns (vocab_parallel.Overlap).
    """

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: tuple[Tensor, ...]
    overlap: Overlap
    tile_logits: int

    @property
    def num_tokens(self) -> int:
        return len(self.student)

    @property
    def padded_width(self) -> int:
        return len(self.student_weight)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.student, self.student_weight, self.teacher, *self.teacher_weight

    def bind(self, student: Tensor, student_weight: Tensor, teacher: Tensor, *teacher_weight: Tensor) -> FusedHead:
        return replace(
            self, student=student, student_weight=student_weight, teacher=teacher, teacher_weight=teacher_weight
        )

    def take(self, index: Tensor) -> FusedHead:
        return replace(self, student=self.student[index], teacher=self.teacher[index])

    def tiles(self, teacher: bool = True) -> Iterator[LogitsTile]:
        """Runs of true columns over all tokens; the caller may overwrite them."""
        dtype, all_rows = compute_dtype(self.student.dtype), slice(0, self.num_tokens)
        for columns in self._columns():
            models = [_product(self.student, self.student_weight[columns], dtype)]
            if teacher:
                models.append(_product(self.teacher, self._teacher_rows(columns), dtype))
            yield all_rows, columns, models

    def _columns(self) -> Iterator[slice]:
        if not self.num_tokens:
            return iter(())
        width = max(1, self.tile_logits // self.num_tokens)
        return _spans(self.overlap.width, width if width < _WIDE else width - width % _WIDE)

    def _teacher_rows(self, columns: slice) -> Tensor:
        parts, offset = [], 0
        for piece in self.teacher_weight:
            part = piece[max(columns.start - offset, 0) : max(columns.stop - offset, 0)]
            parts += [part] if len(part) else []
            offset += len(piece)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def backward(self, gradient: Iterator[Tile]) -> tuple[Tensor, ...]:
        """d loss / d (student hidden [n, H], student weight [V_local, H]); the former covers this rank's columns."""
        hidden = torch.zeros_like(self.student, dtype=compute_dtype(self.student.dtype))
        weight = torch.zeros_like(self.student_weight)
        for _, columns, tile in gradient:
            tile = tile.to(weight.dtype)
            torch.mm(tile.T, self.student, out=weight[columns])
            hidden += tile @ self.student_weight[columns]
        return hidden.to(self.student.dtype), weight

    def spread(self, grads: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        """This head's gradients from those of `take(index)`."""
        hidden, weight = grads
        return torch.zeros_like(self.student).index_copy_(0, index, hidden), weight


def _product(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden @ weight.T in `dtype`: a logit in bf16 has three digits, too few to rank a teacher's candidates by."""
    if hidden.dtype == dtype or not hidden.is_cuda:
        return hidden.to(dtype) @ weight.to(dtype).T
    return torch.mm(hidden, weight.T, out_dtype=dtype)  # the same tensor cores; only what they store is wider

"""What the public functions refuse before they compute, each in one ValueError that names argument, value and rule."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(mask: Tensor, split: int = 1, **tensors: Tensor) -> None:
    """`mask` is [S, B] with a token in it; `tensors` are floating-point [S / split, B, size]."""
    if mask.dim() != 2 or not mask.numel():
        raise ValueError(f"response_mask has shape {tuple(mask.shape)}: must be [S, B] with S and B above 0.")
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or tensor.shape[0] * split != mask.shape[0] or tensor.shape[1] != mask.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: must be [{mask.shape[0] // split}, {mask.shape[1]}, size] "
                f"beside a response_mask of shape {tuple(mask.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: must be floating-point.")


def check_mask(mask: Tensor) -> Tensor:
    """The mask as booleans. One of another dtype is read on the host: labels, whose -100 is true, are no mask."""
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        lowest, highest = mask.min().item(), mask.max().item()
        raise ValueError(
            f"response_mask holds values from {lowest} to {highest}: must be boolean, or 0 and 1. "
            "Of labels pass `labels != -100`."
        )
    return mask.bool()


def check_labels(labels: Tensor | None, mask: Tensor, index: Tensor, vocab_size: int) -> Tensor:
    """Of int `labels` [S, B], as `mask`, those [n] at `index` [n] (s * B + b): true token ids."""
    if labels is None:
        raise ValueError(
            "labels = None: a rule of the configuration looks at the probability of each response token. "
            "Pass labels [S, B], the token that each position predicts, or choose other rules."
        )
    if labels.shape != mask.shape or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}: must be integers of shape "
            f"{tuple(mask.shape)}, as response_mask."
        )
    chosen = labels.flatten()[index].long()
    if bool(((chosen < 0) | (chosen >= vocab_size)).any()):
        raise ValueError(
            f"labels hold ids from {int(chosen.min())} to {int(chosen.max())} where response_mask is true: must lie in "
            f"0 to {vocab_size - 1}, the vocabulary."
        )
    return chosen


def check_keys(keys: Tensor | None, sequences: int, mask: Tensor) -> Tensor:
    """int64 `keys` [sequences] on the device of `mask`."""
    if keys is None:
        raise ValueError(
            "sequence_keys = None: a rule of the configuration draws tokens at random. "
            "Pass one int64 key for each sequence, or choose other rules."
        )
    if keys.shape != (sequences,) or keys.dtype != torch.int64:
        raise ValueError(
            f"sequence_keys have shape {tuple(keys.shape)} and dtype {keys.dtype}: must be int64 of shape "
            f"({sequences},), one for each sequence of the call."
        )
    return keys.to(mask.device)


def check_weight(model: str, hidden: Tensor, weight: Tensor) -> None:
    """`weight` is [V_local, hidden size] in the dtype of `hidden`."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{model}_weight has shape {tuple(weight.shape)}: must be [V_local, {hidden.shape[-1]}], "
            f"the hidden size of {model}_hidden."
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"{model}_weight has dtype {weight.dtype}: must be that of {model}_hidden, {hidden.dtype}. Convert one."
        )


def check_bounds(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """`cu_seqlens` bounds the sequences of one row of `length` tokens, before context parallelism divides it."""
    integers = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and not cu_seqlens.dtype.is_floating_point
    if not integers or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"cu_seqlens = {cu_seqlens}: must be a tensor of integers [sequences + 1].")
    if batch != 1:
        raise ValueError(f"cu_seqlens with {batch} rows: a packed call holds one row. Concatenate the rows.")
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens = {bounds}: must rise from 0 to the row's length ({length}). "
            "Count padding at the end of the row as a sequence of its own."
        )

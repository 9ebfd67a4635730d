"""Rows -> micro-batches: how many rows share one, and how they are padded on the right, ready for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from nemo_tsdkd.config.integers import ceil_div


class MicroBatch(TypedDict):
    """B rows of one micro-batch, padded on the right to S tokens."""

    tokens: Tensor  # [B, S] int64, prompt then response
    position_ids: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64: the token that follows in the row, which the logits at this position predict
    token_mask: Tensor  # [B, S] bool: a token, no padding
    response_mask: Tensor  # [B, S] bool: the logits at this position predict a response token (the first EOS included)
    sample_index: Tensor  # [B] int64


def cut_by_rows(rows: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """Micro-batches of `micro_batch_size` rows, in their order; the last may have fewer."""
    return [list(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)]


def cut_by_tokens(rows: Sequence[int], width: Mapping[int, int], micro_batch_tokens: int) -> list[list[int]]:
    """The fewest micro-batches of at most `micro_batch_tokens` tokens, padding included.

    A row that is wider has one of its own.

    Args:
        rows: the widest first; each micro-batch is padded to its first row.
        width: padded length of each row.
    """
    chunks: list[list[int]] = []
    for row in rows:
        if chunks and (len(chunks[-1]) + 1) * width[chunks[-1][0]] <= micro_batch_tokens:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks


def halve_largest(chunks: Sequence[list[int]], width: Mapping[int, int], count: int) -> list[list[int]]:
    """`count` micro-batches out of fewer: those of the most tokens, padding included, are cut into halves."""
    chunks = list(chunks)
    while len(chunks) < count:
        sizes = [len(chunk) * width[chunk[0]] if len(chunk) > 1 else 0 for chunk in chunks]
        at = sizes.index(max(sizes))
        half = ceil_div(len(chunks[at]), 2)
        chunks[at : at + 1] = chunks[at][:half], chunks[at][half:]
    return chunks


def pad_rows(
    token_ids: Sequence[Sequence[int] | Tensor],
    prompts: Sequence[int],
    responses: Sequence[int],
    index: Sequence[int],
    *,
    width: int,
    pad_id: int,
    device: torch.device | str,
) -> MicroBatch:
    """One micro-batch: rows of token ids, their prompts' and responses' lengths and their sample indices.

    Args:
        width: tokens of the padded rows.
        pad_id: token that fills a row; right of every real token, so causal attention never sees it.
        device: where the tensors live.
    """
    padded = torch.full((len(token_ids), width + 1), pad_id, dtype=torch.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    tokens, labels = padded[:, :-1].contiguous(), padded[:, 1:].contiguous()
    position = torch.arange(width)
    start = torch.tensor(prompts)[:, None] - 1  # the logits before a token predict it
    mask = (position >= start) & (position < start + torch.tensor(responses)[:, None])
    length = torch.tensor([len(ids) for ids in token_ids])[:, None]
    return MicroBatch(
        tokens=tokens.to(device),
        position_ids=position.to(device).expand(len(tokens), width),
        labels=labels.to(device),
        token_mask=(position < length).to(device),
        response_mask=mask.to(device),
        sample_index=torch.tensor(index, device=device),
    )


def empty_micro_batch(width: int, *, pad_id: int, device: torch.device | str) -> MicroBatch:
    """One row of padding alone, `width` tokens wide."""
    return pad_rows([[]], [0], [0], [-1], width=width, pad_id=pad_id, device=device)

"""Sequences of a global batch -> micro-batches: sorted by length, right-padded, ready for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from nemo_tsdkd.config.integers import round_up
from nemo_tsdkd.data.dataset import Sample


class MicroBatch(TypedDict):
    """B rows of one micro-batch, padded on the right to S tokens."""

    tokens: Tensor  # [B, S] int64, prompt then response
    position_ids: Tensor  # [B, S] int64
    response_mask: Tensor  # [B, S] bool: the logits at this position predict a response token (the first EOS included)
    sample_index: Tensor  # [B] int64


def make_micro_batches(
    samples: Sequence[Sample],
    responses: Sequence[Sequence[int]],
    *,
    micro_batch_size: int,
    pad_id: int,
    pad_to_multiple: int = 1,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """Cut the sequences `prompt + response` into micro-batches of rows of about the same length.

    The longest come first: if they do not fit into memory, the step fails at once and not in its middle. Rows of
    one length keep the order of their `sample.index`, so the cut does not depend on the order of `samples`.

    Args:
        samples: the batch's prompts.
        responses: the response of each sample; may be empty, which leaves its row of `response_mask` False.
        micro_batch_size: rows of a micro-batch; divides `len(samples)`.
        pad_id: token that fills a row; right of every real token, so causal attention never sees it.
        pad_to_multiple: S is a multiple of it (TP with sequence parallelism, 2 x CP, FP8's tile).
        device: where the tensors live.

    Raises:
        ValueError: the number of samples is not a multiple of `micro_batch_size`, or differs from that of responses.
    """
    if len(samples) != len(responses) or len(samples) % micro_batch_size:
        raise ValueError(
            f"{len(samples)} samples with {len(responses)} responses cannot be cut into micro-batches of "
            f"{micro_batch_size} rows."
        )
    prompts, written = [len(s.prompt_ids) for s in samples], [len(r) for r in responses]
    token_ids = [[*s.prompt_ids, *r] for s, r in zip(samples, responses, strict=True)]
    lengths, index = list(map(len, token_ids)), [sample.index for sample in samples]
    return [
        pad_rows(
            [token_ids[row] for row in rows],
            [prompts[row] for row in rows],
            [written[row] for row in rows],
            [index[row] for row in rows],
            width=round_up(lengths[rows[0]], pad_to_multiple),
            pad_id=pad_id,
            device=device,
        )
        for rows in cut_rows(lengths, index, micro_batch_size)
    ]


def cut_rows(lengths: Sequence[int], index: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """The rows of each micro-batch, longest first; rows of one length in the order of their samples' `index`."""
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], index[row]))
    return [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]


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
    """One micro-batch: rows of token ids, their prompts' and responses' lengths and their sample indices."""
    tokens = torch.full((len(token_ids), width), pad_id, dtype=torch.int64)
    for row, ids in zip(tokens, token_ids, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    position = torch.arange(width)
    start = torch.tensor(prompts)[:, None] - 1  # the logits before a token predict it
    mask = (position >= start) & (position < start + torch.tensor(responses)[:, None])
    return MicroBatch(
        tokens=tokens.to(device),
        position_ids=position.to(device).expand(len(tokens), width),
        response_mask=mask.to(device),
        sample_index=torch.tensor(index, device=device),
    )

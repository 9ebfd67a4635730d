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

    The longest come first: what does not fit into memory then fails at once and not in the middle of a step. Rows of
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
    rows = sorted(
        zip(samples, responses, strict=True),
        key=lambda row: (-len(row[0].prompt_ids) - len(row[1]), row[0].index),
    )
    chunks = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    return [_pad(chunk, pad_to_multiple, pad_id, device) for chunk in chunks]


def _pad(
    rows: Sequence[tuple[Sample, Sequence[int]]], multiple: int, pad_id: int, device: torch.device | str
) -> MicroBatch:
    longest = len(rows[0][0].prompt_ids) + len(rows[0][1])
    width = round_up(longest, multiple)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (sample, response) in enumerate(rows):
        start, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(response)
        tokens[b, :end] = torch.tensor([*sample.prompt_ids, *response])
        mask[b, start - 1 : end - 1] = True
    return MicroBatch(
        tokens=tokens.to(device),
        position_ids=torch.arange(width, device=device).expand(len(rows), width),
        response_mask=mask.to(device),
        sample_index=torch.tensor([sample.index for sample, _ in rows], device=device),
    )

"""The state of a decoding batch on the device: fixed tensors that every decode step reads and writes in place.

A step exchanges nothing with the host: the device decides whether a row ends, and the host reads the rows' tokens once
a window. So each step is the same device work at the same addresses, which a CUDA graph can replay. A row that has
ended stays until the host removes it; its results until then are discarded, and no other row reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nemo_tsdkd.distributed.counters import fold
from nemo_tsdkd.rollout.sampling import NO_TOKEN
from nemo_tsdkd.rollout.schedule import NOTHING, Row


class Rows:
    """`rows` rows of a batch over windows of at most `window` decode steps. Pass 0 of a window is its prefills.

    Attributes, all int64 [rows]:
        tokens: drawn last; the input of the next step.
        positions: of these tokens; before a row's first token, of its prompt's last one.
        remaining: how many tokens the row may still write; 0 or less: it has ended.
    """

    def __init__(self, rows: int, window: int, eos_ids: Sequence[int], device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)
        self._state = zeros(5, rows)
        self._staging = torch.zeros(5, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.tokens, self.positions, self.remaining, self._first, self._sample_keys = self._state.unbind()
        self._ends = torch.tensor([*eos_ids, NO_TOKEN], dtype=torch.int64, device=device)  # tokens that end a row
        self._pass = zeros(1)  # the running one
        self._passes = torch.arange(window + 1, device=device)[:, None]
        self._noise = zeros(window + 1, rows)  # keys of each row's noise in each pass
        self._history = zeros(window + 1, rows)  # each row's token of each pass

    def load(self, rows: Sequence[Row], sample_keys: Tensor) -> None:
        """Begin a window with these rows: one copy to the device.

        Args:
            sample_keys: int64 [prompts], on the host; the noise of a sample lies below its key (`counters.fold`).
        """
        if not rows:
            return
        # A row draws its token number `first + pass`. A new one begins in pass 0, its prefill; the others in pass 1.
        state = [(r.token, r.position, r.limit - r.written, max(r.written, 1) - 1) for r in rows]
        self._staging.zero_()
        self._staging[:4, : len(rows)] = torch.tensor(state).t()
        self._staging[4, : len(rows)] = sample_keys[[r.sequence for r in rows]]
        self._state.copy_(self._staging, non_blocking=True)
        self._noise.copy_(fold(self._sample_keys, self._first + self._passes))
        self._history[0].fill_(NOTHING)
        self._pass.zero_()

    def noise(self, rows: slice) -> Tensor:
        """Keys of the noise for the next token of each row: they depend on its sample and its place in the response."""
        return self._noise[:, rows].index_select(0, self._pass)[0]

    def next_pass(self) -> None:
        self._pass.add_(1)

    def advance(self, rows: slice) -> None:
        """Record the drawn `tokens` of rows that have not ended; end each row or advance its position."""
        tokens, remaining = self.tokens[rows], self.remaining[rows]
        self._history[:, rows].index_copy_(0, self._pass, tokens.masked_fill(remaining <= 0, NOTHING)[None])
        remaining.sub_(1)
        remaining.masked_fill_((tokens[:, None] == self._ends).any(-1), 0)
        self.positions[rows].add_(remaining > 0)
        tokens.clamp_(min=0)  # NO_TOKEN has no embedding

    def read(self, rows: int, steps: int) -> list[list[int]]:
        """Tokens of the first `rows` rows in the prefills and in each of the window's `steps` steps. The only wait for
        the device in a window."""
        return self._history[: steps + 1, :rows].tolist()

"""What a rollout decides before and after the model runs: who is decoded when, and what counts as a response.

Nothing here knows a model. `Schedule` plays continuous batching over the rows of a KV cache: prompts wait, longest
first; a finished sequence leaves at once; the rows in use are always the first ones, so that a pass never computes
an empty row; when an eighth of the batch is free, waiting prompts are prefilled together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

REFILL_SHARE = 8  # prefill when 1/8 of the rows is free: one pass for several prompts
PREFILL_TOKENS = 16384  # most tokens, padding included, of one prefill pass: bounds its activations


@dataclass(frozen=True)
class Response:
    """What the model wrote after a prompt, the first end-of-sequence token included."""

    token_ids: list[int]
    truncated: bool  # a length limit came before any end-of-sequence token


@dataclass(frozen=True)
class Pass:
    """One forward pass: the n sequences in the cache's rows `first_row` onwards and the tokens they feed."""

    first_row: int
    sequences: list[int]  # [n] indices of the prompts
    token_ids: list[list[int]]  # [n] a whole prompt each, or one token each
    positions: list[int]  # [n] of the last token fed
    prefill: bool


def interleave(parts: Sequence[Sequence[Response]]) -> list[Response]:
    """What was dealt out as `everything[i :: n]` to part `i`, in order again."""
    everything: list[Any] = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        everything[i :: len(parts)] = part
    return everything


class Schedule:
    """Continuous batching of `prompts` over `batch_size` cache rows.

    Call `next_pass()`, run it, hand its sampled tokens to `record()`, until `finished`.

    Raises:
        ValueError: an empty prompt, or one that leaves no room for a response within `max_length`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int,
        max_new_tokens: int,
        max_length: int,
        eos_ids: Collection[int],
    ) -> None:
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < max_length:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens: it must have at least 1 and fewer than "
                    f"max_length = {max_length}, to leave room for a response. Drop it or raise max_length."
                )
        self.prompts = prompts
        self.batch_size = batch_size
        self.eos_ids = frozenset(eos_ids)
        self.limits = [min(max_new_tokens, max_length - len(prompt)) for prompt in prompts]
        self.written: list[list[int]] = [[] for _ in prompts]
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.live: list[int] = []  # the sequence in row 0, 1, ...

    @property
    def finished(self) -> bool:
        return not self.live and not self.waiting

    @property
    def cache_length(self) -> int:
        """Tokens the longest sequence can put into the cache; the last one written is never fed."""
        return max((len(p) + n - 1 for p, n in zip(self.prompts, self.limits, strict=True)), default=0)

    def next_pass(self) -> Pass:
        """Prefill waiting prompts if enough rows are free, else feed every live sequence its last token."""
        free = self.batch_size - len(self.live)
        wanted = min(max(1, self.batch_size // REFILL_SHARE), len(self.waiting))
        if wanted and free >= wanted:
            return self._prefill(free)
        return Pass(
            first_row=0,
            sequences=list(self.live),
            token_ids=[self.written[i][-1:] for i in self.live],
            positions=[len(self.prompts[i]) + len(self.written[i]) - 1 for i in self.live],
            prefill=False,
        )

    def _prefill(self, free: int) -> Pass:
        longest = len(self.prompts[self.waiting[0]])
        count = min(free, len(self.waiting), max(1, PREFILL_TOKENS // longest))
        admitted = [self.waiting.popleft() for _ in range(count)]
        first_row = len(self.live)
        self.live += admitted
        prompts = [list(self.prompts[i]) for i in admitted]
        return Pass(first_row, admitted, prompts, [len(p) - 1 for p in prompts], prefill=True)

    def record(self, done: Pass, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Append each sequence's sampled token; drop the finished ones.

        Returns:
            (source, target) rows the cache must copy, in this order, to close the gaps.
        """
        ended = []
        for row, (sequence, token) in enumerate(zip(done.sequences, token_ids, strict=True), done.first_row):
            written = self.written[sequence]
            written.append(token)
            if token in self.eos_ids or len(written) == self.limits[sequence]:
                ended.append(row)
        moves = []
        for row in reversed(ended):
            last = self.live.pop()
            if row < len(self.live):
                self.live[row] = last
                moves.append((len(self.live), row))
        return moves

    def responses(self) -> list[Response]:
        """The responses in the prompts' order; call when `finished`."""
        assert self.finished
        return [Response(tokens, truncated=tokens[-1] not in self.eos_ids) for tokens in self.written]

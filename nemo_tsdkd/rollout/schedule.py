"""Schedule of a rollout: which sequence is decoded when, and when a response ends. Independent of the model.

`Schedule` does continuous batching over the rows of a KV cache: prompts wait, longest first; the rows in use are always
the first ones; when an eighth of the batch is free, waiting prompts are prefilled together. It receives tokens once a
window of several decode steps: a sequence that ends within a window keeps its row until the window's end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nemo_tsdkd.config.integers import round_up

REFILL_SHARE = 8  # prefill when 1/8 of the rows is free: one pass for several prompts
PREFILL_TOKENS = 16384  # most tokens, padding included, of one prefill pass: bounds its activations
NOTHING = -2  # in place of a token if the row has ended; -1 is sampling.NO_TOKEN


@dataclass(frozen=True)
class Response:
    """The generated tokens after a prompt, with the first end-of-sequence token."""

    token_ids: list[int]
    truncated: bool  # a length limit came before any end-of-sequence token


@dataclass(frozen=True)
class Prefill:
    """One pass over whole prompts, into the cache's rows `first_row` onwards."""

    first_row: int
    prompts: list[list[int]]  # the longest first


class Row(NamedTuple):
    """State of the sequence in one row of the cache."""

    sequence: int  # index of its prompt
    token: int  # generated last, the next input; 0 before the first
    position: int  # of that token, or of the prompt's last one before the first is written
    written: int  # tokens of the response so far
    limit: int  # most tokens of the response


def interleave(parts: Sequence[Sequence[Response]]) -> list[Response]:
    """The items in order, where part `i` holds `items[i :: n]`."""
    items: list[Any] = [None] * sum(map(len, parts))
    for i, part in enumerate(parts):
        items[i :: len(parts)] = part
    return items


def row_bucket(rows: int, most: int) -> int:
    """How many rows a step computes so that `rows` are among them: 1, 2, 4 or a multiple of 8, at most `most`."""
    return min(next((n for n in (1, 2, 4) if n >= rows), round_up(rows, 8)), most)


class Schedule:
    """Continuous batching of `prompts` over `batch_size` cache rows.

    Until `finished`: run what `admit()` returns, then one decode step over `rows()` for each element of `window()`, and
    pass the tokens to `record()`.

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

    def admit(self) -> list[Prefill]:
        """Prefill passes over waiting prompts, which get rows; none unless enough rows are free."""
        passes = []
        while self.waiting:
            free = self.batch_size - len(self.live)
            if free < min(max(1, self.batch_size // REFILL_SHARE), len(self.waiting)):
                break
            longest = len(self.prompts[self.waiting[0]])
            count = min(free, len(self.waiting), max(1, PREFILL_TOKENS // longest))
            admitted = [self.waiting.popleft() for _ in range(count)]
            passes.append(Prefill(len(self.live), [list(self.prompts[i]) for i in admitted]))
            self.live += admitted
        return passes

    def rows(self) -> list[Row]:
        """The rows in use, as they stand before a window and its prefills."""
        rows = []
        for i in self.live:
            written = self.written[i]
            position = len(self.prompts[i]) + len(written) - 1
            rows.append(Row(i, written[-1] if written else 0, position, len(written), self.limits[i]))
        return rows

    def window(self, steps: int) -> list[int]:
        """For each decode step until the host looks again, how many of the cache's positions any row may use.

        At most `steps`, and none beyond what the limits allow: at least one row may still write in each.
        """
        ranges = []  # positions that each row feeds from now on, if no end-of-sequence token comes
        for i in self.live:
            first = len(self.prompts[i]) + max(len(self.written[i]), 1) - 1  # its prefill writes the first token
            ranges.append((first, len(self.prompts[i]) + self.limits[i] - 1))
        steps = min(steps, max((end - first for first, end in ranges), default=0))
        return [max(min(first + step + 1, end) for first, end in ranges) for step in range(steps)]

    def record(self, history: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Append the tokens of each pass of a window, one a row (NOTHING where there is none); remove sequences
        that ended.

        Returns:
            (source, target) rows the cache must copy, in this order, to close the gaps.
        """
        ended = []
        for row, (sequence, tokens) in enumerate(zip(self.live, zip(*history, strict=True), strict=True)):
            written = self.written[sequence]
            written += [token for token in tokens if token != NOTHING]
            if written[-1] in self.eos_ids or len(written) == self.limits[sequence]:
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

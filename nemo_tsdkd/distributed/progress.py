"""How far a long work is: a bar on a terminal, lines in a log file. On one rank only."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nemo_tsdkd.distributed.output import terminal

LINE_EVERY = 60.0  # seconds


class ProgressDisplay:
    """A bar on a terminal; in a log file a line for the first and the last count, and between them one in LINE_EVERY.

    Args:
        what: is counted, such as "step".
        total: the last count.
        done: the count of an earlier process, from which this one goes on.
        only_long: a log file gets no line of a work that takes less than LINE_EVERY.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, only_long: bool = False) -> None:
        self.what, self.total, self.first, self.start = what, total, done, time.monotonic()
        self.line_at, self.silent = self.start + LINE_EVERY if only_long else 0.0, only_long
        self.console = Console(file=terminal())
        self.bar = Progress(
            TextColumn(what),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=total, completed=done, said="")
        self.bar.start()

    def show(self, done: int, said: str, more: str = "") -> None:
        """Show the count, what is said beside it, the remaining time and then `more`."""
        now = time.monotonic()
        eta = timedelta(seconds=round((now - self.start) / max(done - self.first, 1) * (self.total - done)))
        said = f"{said}  ETA {eta}{f'  {more}' if more else ''}"
        self.bar.update(self.task, completed=done, said=said)
        if not self.console.is_terminal and (now >= self.line_at or (done == self.total and not self.silent)):
            self.line_at, self.silent = now + LINE_EVERY, False
            self.console.print(f"{self.what} {done}/{self.total}  {said}", highlight=False, soft_wrap=True)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.bar.stop()


def on_rank_zero(rank: int, what: str, total: int, **options: Any) -> AbstractContextManager[ProgressDisplay | None]:
    """A display on rank 0, which knows how far it is itself with its share; None on the other ranks."""
    return ProgressDisplay(what, total, **options) if rank == 0 else nullcontext()

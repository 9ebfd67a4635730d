"""Stop signals: which they are, and how they end a process before training begins. Imports no torch.

During training `megatron/callbacks.py` handles them: it saves after the running step.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nemo_tsdkd.distributed.launch import by_torchrun
from nemo_tsdkd.distributed.output import terminal_descriptor

# Sent by a cluster (the first two), by Ctrl-C, and by a terminal that closes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_BY_HAND = (signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
Handler = Callable[[int, FrameType | None], None]


@dataclass(frozen=True)
class Stopped:
    """A run that a signal ended after a step, and the checkpoint of that step."""

    signum: int
    step: int
    checkpoint: Path

    @property
    def exit_status(self) -> int:
        """0 for a cluster's signal, which is no failure; 128 + n, as in a shell, for a user's: a script stops."""
        return 128 + self.signum if self.signum in _BY_HAND else 0


def handle_stop_signals(handler: Handler) -> None:
    """Install `handler` for each stop signal; a second SIGINT ends the process at once.

    SIGINT and SIGHUP stay ignored if the parent ignores them, as `nohup` does.
    """

    def once(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # also while the interpreter waits inside a library's call
        handler(signum, frame)

    for signum in STOP_SIGNALS:
        if signum not in _BY_HAND or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, once if signum == signal.SIGINT else handler)


def exit_on_stop_signals(command: str, prints: bool) -> None:
    """Until training begins, end this process on a stop signal: there is nothing to save.

    Args:
        command: the command line that starts it again.
        prints: whether this rank writes the line to stderr.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        if prints:
            line = f"nemo-tsdkd: {signal.Signals(signum).name}: stopped before the first step of this attempt, nothing "
            os.write(terminal_descriptor(), f"{line}to save. Start again with: {command}\n".encode())
        os._exit(128 + signum)

    handle_stop_signals(leave)


def end_with_torchrun() -> None:
    """Get SIGTERM when torchrun, this rank's parent, ends without stopping its ranks, as it does on SIGUSR1. Else they
    would go on training and occupy the GPUs and the run folder of the next attempt."""
    if by_torchrun():
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)

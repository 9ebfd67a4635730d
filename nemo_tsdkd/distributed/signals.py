"""Requests to stop: which signals they are, and what they do before there is anything to save. Imports no torch.

Once training runs, `megatron/callbacks.py` answers them: it saves after the running step.
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

# A cluster's, a user's Ctrl-C, and a terminal that is closed.
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
        """0 for a cluster's request, which is no failure; a shell's 128 + n for a person's, so that a script stops."""
        return 128 + self.signum if self.signum in _BY_HAND else 0


def handle_stop_signals(handler: Handler) -> None:
    """Answer each stop signal with `handler`; after a first SIGINT, a second one ends the process at once.

    What the parent ignores stays ignored: `nohup` means the run to outlive its terminal.
    """

    def once(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # also while the interpreter waits inside a library's call
        handler(signum, frame)

    for signum in STOP_SIGNALS:
        if signum not in _BY_HAND or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, once if signum == signal.SIGINT else handler)


def exit_on_stop_signals(command: str, prints: bool) -> None:
    """Until training begins, let a stop signal end this process: there is nothing to save.

    Args:
        command: what to type to start again.
        prints: whether this rank writes the line to stderr.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        if prints:
            line = f"nemo-tsdkd: {signal.Signals(signum).name}: stopped before the first step of this attempt, nothing "
            os.write(terminal_descriptor(), f"{line}to save. Start again with: {command}\n".encode())
        os._exit(128 + signum)

    handle_stop_signals(leave)


def end_with_torchrun() -> None:
    """Get SIGTERM when torchrun, this rank's parent, ends without a word to its ranks, as SIGUSR1 makes it do: they
    would train on, unseen, and fight with the next attempt for GPUs and run folder."""
    if by_torchrun():
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)

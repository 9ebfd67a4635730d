"""Output: the program's own lines go to the terminal; output of libraries and tracebacks go to a log file."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_terminal: TextIO | None = None
_to_console = False


def terminal() -> TextIO:
    """Standard error, also while the output of libraries goes to a log file."""
    return _terminal or sys.stderr


def terminal_descriptor() -> int:
    """The same as a descriptor, for a signal's handler."""
    return _terminal.fileno() if _terminal else 2


def leave_library_output() -> None:
    """Leave the output of libraries on the console: from now on `redirect_library_output` does nothing."""
    global _to_console
    _to_console = True


@contextmanager
def redirect_library_output(log: Path) -> Iterator[None]:
    """Append to `log` the output of this process and its children, and the traceback of an error. The error gets a note
    that names the file. Our own log messages go to the terminal too. An empty log is removed."""
    global _terminal
    if _to_console:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    _terminal = os.fdopen(os.dup(2), "w")
    handler = logging.StreamHandler(_terminal)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger("nemo_tsdkd").addHandler(handler)
    try:
        with log.open("ab", buffering=0) as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        yield
    except BaseException as error:
        with suppress(OSError):  # the log's disk may be full
            os.write(2, traceback.format_exc().encode(errors="replace"))
        error.add_note(f"More in {log}.")
        raise
    finally:
        with suppress(OSError):
            sys.stdout.flush(), sys.stderr.flush()
        logging.getLogger("nemo_tsdkd").removeHandler(handler)
        _terminal.close()
        _terminal = None
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        with suppress(FileNotFoundError):  # another rank may share it and remove it first
            if log.stat().st_size == 0:
                log.unlink()

"""Run a verifier in a process of its own, one response at a time, each within a time limit.

A verifier computes on what a model wrote: it may take for ever, fill the memory or end the process in code that no
Python exception reaches. Here that costs one verdict, not the run.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_tsdkd.verifiers.verdict import VERIFIERS, Verdict

TIME_LIMIT = 10.0  # seconds for a verdict
START_LIMIT = 300.0  # seconds for the imports, which a network file system may slow down
MEMORY_LIMIT = 8 * 2**30  # bytes of address space
_READY = b"ready\n"


def judge_all(
    name: str, responses: Sequence[str], references: Sequence[Any], time_limit: float | None = None
) -> list[Verdict]:
    """The verdict of the verifier `name` on each response.

    Raises:
        RuntimeError: the verifier's process does not start.
    """
    verdicts: list[Verdict] = []
    worker = _Worker(name) if responses else None
    try:
        for response, reference in zip(responses, references, strict=True):
            if worker is None:
                worker = _Worker(name)
            answered = worker.ask(response, reference, TIME_LIMIT if time_limit is None else time_limit)
            if isinstance(answered, str):
                worker.end()
                worker = None  # what is left is judged by a new process
                answered = Verdict(False, None, _text(reference), answered)
            verdicts.append(answered)
    finally:
        if worker:
            worker.end()
    return verdicts


def _text(reference: Any) -> str:
    return str(reference.get("answer", "")) if isinstance(reference, dict) else str(reference)


class _Worker:
    def __init__(self, name: str) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nemo_tsdkd.verifiers.judge", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
        )
        if self._line(START_LIMIT) != _READY:
            self.end()
            raise RuntimeError(f"the process of the verifier {name!r} does not start; its log says why.")

    def ask(self, response: str, reference: Any, time_limit: float) -> Verdict | str:
        """The verdict, or why there is none; the process is then of no more use."""
        assert self._process.stdin
        try:
            left = memoryview(json.dumps([response, reference]).encode() + b"\n")
            while left:
                left = left[self._process.stdin.write(left) :]
        except BrokenPipeError:
            return "the verifier's process has ended"
        line = self._line(time_limit)
        if line is None:
            return f"no verdict within {time_limit:g} s"
        return Verdict(**json.loads(line)) if line else "the verifier's process has ended"

    def _line(self, seconds: float) -> bytes | None:
        """The next line that it writes; empty at its end, None when the time is over."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        return self._process.stdout.readline()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(name: str) -> None:
    """Judge each line of stdin; write each verdict as a line, to what stdout was before: a verifier may print."""
    import logging
    import resource

    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    registered = VERIFIERS[name]
    if registered.package:
        import_module(registered.package)  # before the first response's time begins
    verifier = registered.make()
    answers.write(_READY)
    for line in sys.stdin.buffer:
        response, reference = json.loads(line)
        try:
            verdict = verifier.judge(response, reference)
        except Exception as error:  # of any library
            said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            verdict = Verdict(False, None, _text(reference), said)
        answers.write(json.dumps(asdict(verdict)).encode() + b"\n")


if __name__ == "__main__":
    _serve(sys.argv[1])

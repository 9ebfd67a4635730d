"""Dry runs of several ranks, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nemo_tsdkd.config.validation import HostError
from nemo_tsdkd.distributed.launch import environment_outside
from nemo_tsdkd.plan.request import ACTS, Request, Result


def dry_runs(requests: Sequence[Request], show: Callable[[int], None], at_once: int = 0) -> list[Result]:
    """The results of all requests, in their order.

    Args:
        show: is called with the number of acts that have ended when there are more, at the end ACTS for each request.
        at_once: most processes at one time; 0: as many as there are CPUs.

    Raises:
        HostError: a process was killed, as one that finds no memory is.
        RuntimeError: a dry run failed.
    """
    # Without a GPU's number, the stand-in runs also where there is a GPU.
    environment = environment_outside() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    at_once, shown = at_once or os.cpu_count() or 1, 0
    with TemporaryDirectory() as scratch:
        runs = [_Run(request, Path(scratch, str(i)), environment) for i, request in enumerate(requests)]
        try:
            while not all(run.done for run in runs):
                waiting, running = [r for r in runs if not r.begun], [r for r in runs if r.begun and not r.done]
                for run in waiting[: at_once - len(running)]:
                    run.begin()
                time.sleep(0.2)
                if (now := sum(run.acts for run in runs)) > shown:
                    shown = now
                    show(shown)
            return [run.result() for run in runs]
        finally:
            for run in runs:
                run.stop()


class _Run:
    def __init__(self, request: Request, folder: Path, environment: dict[str, str]) -> None:
        self.request, self.folder, self.environment = request, folder, environment
        self.process: subprocess.Popen | None = None
        folder.mkdir()

    def begin(self) -> None:
        (self.folder / "request").write_text(json.dumps(self.request.as_json()))
        files = [str(self.folder / name) for name in ("result", "progress")]
        with (self.folder / "request").open() as request, (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nemo_tsdkd.megatron.dry_run", *files],
                stdin=request,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )

    @property
    def begun(self) -> bool:
        return self.process is not None

    @property
    def done(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    @property
    def acts(self) -> int:
        """That have ended."""
        progress = self.folder / "progress"
        if self.done:
            return ACTS
        begun = progress.stat().st_size if progress.exists() else 0
        return min(max(begun - 1, 0), ACTS - 1)

    def result(self) -> Result:
        assert self.process is not None
        if self.process.returncode == 0:
            return Result(**json.loads((self.folder / "result").read_text()))
        if self.process.returncode == -9:
            raise HostError(f"the dry run of rank {self.request.rank} was killed: no memory? It needs some 4 GiB.")
        tail = "\n".join((self.folder / "log").read_text().splitlines()[-20:])
        raise RuntimeError(f"the dry run of rank {self.request.rank} failed:\n{tail}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

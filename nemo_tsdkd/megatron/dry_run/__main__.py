"""`python -m nemo_tsdkd.megatron.dry_run RESULT PROGRESS`: the request comes on stdin, the result goes into a file, and
a byte into another for each act that begins. It is a process of its own, because it patches torch and Megatron."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nemo_tsdkd.megatron.dry_run.run import dry_run
from nemo_tsdkd.plan.request import Request

if __name__ == "__main__":
    result, progress = map(Path, sys.argv[1:])
    with progress.open("wb", buffering=0) as acts:
        found = dry_run(Request.from_json(json.load(sys.stdin)), lambda: acts.write(b"."))
    result.write_text(json.dumps(vars(found)))

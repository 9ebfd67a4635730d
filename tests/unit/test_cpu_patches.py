"""Importing changes torch only in `nemo_tsdkd.megatron`, only without a GPU, and not where the user forbids it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CPU = Path(__file__).parents[2] / "nemo_tsdkd" / "megatron" / "cpu.py"
# Prints what of torch was replaced, and what install() returned: by path, for the package's import takes NeMo along.
SCRIPT = """
import importlib.util, inspect, json, logging, sys
import torch, torch.distributed
logging.basicConfig(level=logging.WARNING)
OWNERS = {"torch": torch, "Tensor": torch.Tensor, "Module": torch.nn.Module, "cuda": torch.cuda,
          "distributed": torch.distributed}
def look():
    return {(name, key): inspect.getattr_static(owner, key) for name, owner in OWNERS.items() for key in dir(owner)}
before = look()
import nemo_tsdkd.objective
active = None
if sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("cpu", sys.argv[1])
    cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu)
    active = cpu.install()
after = look()
changed = sorted(".".join(key) for key, value in before.items() if callable(value) and after[key] is not value)
print(json.dumps([active, changed, sorted({name.split(".")[0] for name in sys.modules} & {"megatron", "nemo"})]))
"""


def run(*arguments: str, **environment: str) -> tuple[list, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_objective_alone_patches_nothing():
    assert run()[0] == [None, [], []]


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched where there is a GPU")
def test_without_a_gpu_the_log_reports_once_that_torch_is_patched():
    (active, changed, _), log = run(str(CPU), RANK="0")
    assert active and {"torch.zeros", "torch.compile", "Tensor.to", "cuda.current_device"} <= set(changed)
    assert log.count("torch is patched in this process") == 1 and "TSDKD_PATCH_TORCH=0" in log


def test_a_user_can_forbid_it():
    assert run(str(CPU), TSDKD_PATCH_TORCH="0")[0] == [False, [], []]

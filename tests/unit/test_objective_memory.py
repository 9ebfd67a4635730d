"""Peak memory at the real vocabulary, as benchmarks/loss.py measures it: each row in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loss.py"
TOKENS = 256
LOGITS_BYTES = TOKENS * 152_064 * 4


@pytest.mark.parametrize(
    ("row", "most"), [("ours paper", 1.3), ("ours paper, in place", 0.3), ("ours fused paper", 0.3)]
)
def test_forward_and_backward_allocate_little_beyond_the_gradient(row, most):
    """In multiples of one fp32 logits tensor of 256 tokens; the first returns a gradient of 1.0."""
    command = [sys.executable, "-W", "ignore", str(BENCHMARK), "--row", row, "--tokens", str(TOKENS)]
    command += ["--dtypes", "float32", "--threads", "1", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["extra_bytes"] / LOGITS_BYTES < most

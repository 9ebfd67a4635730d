"""Where ranks wait for one that has hours of work left.

NCCL's and Megatron's groups give up after half an hour, and should: that is how a hang is found. But some work is
rightly unequal: one rank imports a model, or a data-parallel rank's samples all run to the length limit.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

PATIENCE = timedelta(days=1)


def patient_group() -> ProcessGroup:
    """A gloo group of all ranks in which a collective may take `PATIENCE`. Collective; destroyed with the world."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)

"""Two models in two layouts on the same ranks: Megatron's process groups of one model in place of the other's.

Megatron keeps its groups and random states in module globals, which models read when they are built and when they
run. This is the only place that exchanges them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel import random as tracker

from nemo_tsdkd.config.schema import ParallelConfig

_TRACKER = ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED")


class ModelParallelState:
    """Megatron's parallel state of a model that has a layout of its own.

    Args:
        parallel: the layout; data parallel is what is left of the default process group. None: the model shares the
            parallel state that is in place, and entering its world only keeps random states as they are.
    """

    def __init__(self, parallel: ParallelConfig | None) -> None:
        self._state: dict[str, Any] | None = None
        if parallel is None:
            return
        blank, scratch = dict.fromkeys(_group_names(), None), parallel_state._GLOBAL_MEMORY_BUFFER
        with _random_states_kept(), _in_place(blank, dict.fromkeys(_TRACKER, None)):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                context_parallel_size=parallel.context_parallel_size,
            )
            model_parallel_cuda_manual_seed(0)  # a frozen model draws nothing; building one asks for the states
            self._state = {name: getattr(parallel_state, name) for name in blank}
            self._state["_GLOBAL_MEMORY_BUFFER"] = (
                scratch or parallel_state._GLOBAL_MEMORY_BUFFER
            )  # one for both models
            self._tracker = {name: getattr(tracker, name) for name in _TRACKER}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Megatron runs in this world; afterwards all is as it was, random states too."""
        with _random_states_kept():
            if self._state is None:
                yield
                return
            with _in_place(self._state, self._tracker):
                yield


def _group_names() -> list[str]:
    return [name for name in vars(parallel_state) if name.startswith("_") and name[1:2].isupper() and name.isupper()]


@contextmanager
def _in_place(groups: dict[str, Any], random: dict[str, Any]) -> Iterator[None]:
    """Set globals of Megatron's two modules; set them back, whatever happens."""
    before = [(parallel_state, name, getattr(parallel_state, name)) for name in groups]
    before += [(tracker, name, getattr(tracker, name)) for name in random]
    try:
        for module, values in ((parallel_state, groups), (tracker, random)):
            for name, value in values.items():
                setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state()
    states = tracker.get_cuda_rng_tracker().get_states() if tracker._CUDA_RNG_STATE_TRACKER else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state(cuda)
        if states is not None:
            tracker.get_cuda_rng_tracker().set_states(states)

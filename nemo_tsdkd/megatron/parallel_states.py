"""Two models in two layouts on the same ranks: switch Megatron's parallel state from one model to the other.

Megatron keeps its groups and random states in module globals, which models read when they are built and when they
run. Only this module switches them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel import random as tracker

from nemo_tsdkd.config.schema import TeacherLayoutConfig

_TRACKER = ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED")


class ModelParallelState:
    """Megatron's parallel state for a model with its own layout.

    Args:
        parallel: the layout; data parallel is what is left of the default process group. None: the model shares the
            current parallel state, and `active` only preserves random states.
    """

    def __init__(self, parallel: TeacherLayoutConfig | None) -> None:
        self._state: dict[str, Any] | None = None
        if parallel is None:
            return
        blank, scratch = dict.fromkeys(_group_names(), None), parallel_state._GLOBAL_MEMORY_BUFFER
        with _preserve_random_states(), _globals_set_to(blank, dict.fromkeys(_TRACKER, None)):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                context_parallel_size=parallel.context_parallel_size,
                expert_model_parallel_size=parallel.expert_model_parallel_size,
                expert_tensor_parallel_size=1,  # every expert is whole on its rank
            )
            model_parallel_cuda_manual_seed(0)  # a frozen model draws nothing; building one asks for the states
            self._state = {name: getattr(parallel_state, name) for name in blank}
            self._state["_GLOBAL_MEMORY_BUFFER"] = (
                scratch or parallel_state._GLOBAL_MEMORY_BUFFER
            )  # shared by both models
            self._tracker = {name: getattr(tracker, name) for name in _TRACKER}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Megatron uses this parallel state in the block; afterwards groups and random states are restored."""
        with _preserve_random_states():
            if self._state is None:
                yield
                return
            with _globals_set_to(self._state, self._tracker):
                yield


def _group_names() -> list[str]:
    return [name for name in vars(parallel_state) if name.startswith("_") and name[1:2].isupper() and name.isupper()]


@contextmanager
def _globals_set_to(groups: dict[str, Any], random: dict[str, Any]) -> Iterator[None]:
    """Set globals of Megatron's two modules; restore them afterwards, also after an error."""
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
def _preserve_random_states() -> Iterator[None]:
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state()
    states = tracker.get_cuda_rng_tracker().get_states() if tracker._CUDA_RNG_STATE_TRACKER else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state(cuda)
        if states is not None:
            tracker.get_cuda_rng_tracker().set_states(states)

"""Answers for what a dry run has not: the other ranks, and the values of the tensors.

Floating-point tensors are fake: they have a shape and no memory. Integers and masks are real, because they decide
shapes: which positions belong to responses, which rows a micro-batch has. Where a decision depends on a fake value, an
answer stands in LISTED, by the function that asks; anything else that depends on a value raises. So new code cannot
make a dry run wrong in silence.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup, FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_tsdkd.distributed.job import Job

aten = torch.ops.aten
# Collectives on lists of tensors, for which torch has no fake version.
_COALESCED = (
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.allreduce_coalesced_.default,
)


def fake_ranks(rank: int, world_size: int, students: int) -> Job:
    """The process groups of a job of `world_size` ranks, of which this process is one and the others do not exist.

    torch's fake backend returns at once; an all-gather gives this rank's own part for each.

    Args:
        students: the first ranks; any others run the teacher only, in a default group of their own.
    """
    teacher_only = rank >= students
    own, size = (rank - students, world_size - students) if teacher_only else (rank, students)
    dist.init_process_group("fake", rank=own, world_size=size, store=FakeStore())
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs | {"backend": None})  # Megatron and this package also ask for gloo by name

    dist.new_group = dist.distributed_c10d.new_group = fake_group
    dist.all_gather_object = _all_gather_object
    dist.broadcast_object_list = dist.distributed_c10d.broadcast_object_list = lambda *args, **kwargs: None
    if students == world_size:
        return Job(rank, world_size, dist.group.WORLD)
    both = _group_of_all(rank, world_size)
    return Job(rank, world_size, both, both, teacher_only)


def _group_of_all(rank: int, world_size: int) -> dist.ProcessGroup:
    """A fake group that is larger than the default one."""
    group = dist.ProcessGroup(FakeStore(), rank, world_size)
    backend = FakeProcessGroup._create_internal(rank, world_size)
    kind = dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, backend)
    group._set_group_name("job")
    return group


def _all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
    """Every rank has what this one has. The collectives are torch's, of the size and of the pickled bytes; its own
    function makes a tensor out of a storage, which fake tensors cannot."""
    size = len(pickle.dumps(own))
    for part in (torch.zeros(1, dtype=torch.int64), torch.zeros(size, dtype=torch.uint8)):
        dist.all_gather([torch.zeros_like(part) for _ in objects], part, group=group)
    objects[:] = [own] * len(objects)


# Where code of ours or of the libraries asks for a value that does not exist, (folder and file, function), and the
# answer. A `nonzero` selects all elements, or the first ones of them.
LISTED: dict[tuple[str, str], str] = {
    ("objective/function.py", "_rows"): "tokens with weight in a term: all, or `opener_share` of them in the indirect",
    ("objective/function.py", "evaluate"): "tokens with a gradient: all",
    ("objective/extra_terms.py", "extra_terms"): "tokens in responses: all",
    ("objective/sequences.py", "gather"): "tokens in the mask: all",
    ("optimizer/clip_grads.py", "get_grad_norm_fp32"): "the gradient's norm: 1",
    ("utilities/apply_func.py", "to_item"): "what Lightning would show in a progress bar",
    ("megatron/expert_load.py", "largest_over_mean"): "how evenly experts are chosen, which is reported",
    ("megatron/strategy.py", "_reduce"): "means that are reported",
    ("megatron/strategy.py", "_not_finite"): "where a loss was not finite: nowhere",
    ("megatron/strategy.py", "_response_lengths"): "lengths that are reported",
}


class Answers(TorchDispatchMode):
    """Computes integers and masks, and answers what LISTED says; use it above a `FakeTensorMode`."""

    def __init__(self, opener_share: float = 1.0) -> None:
        super().__init__()
        self.opener_share = opener_share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(isinstance(t, FakeTensor) or t.is_floating_point() for t in tensors):
            real = _real(func, args, kwargs)
            if real is not None:
                return real
        elif func is aten._local_scalar_dense.default:
            return self._scalar(args[0])
        elif func is aten.nonzero.default:
            return self._nonzero(args[0])
        elif func is aten.index.Tensor:
            args = args[0], _as_numbers(args[1])
        elif func in _COALESCED:
            return FakeWork().boxed()
        return func(*args, **kwargs)

    def _scalar(self, tensor: Tensor) -> bool | float | int:
        self._answer()
        return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

    def _nonzero(self, tensor: Tensor) -> Tensor:
        place = self._answer()
        share = self.opener_share if place == ("objective/function.py", "_rows") and _of_opener() else 1
        assert tensor.dim() == 1
        with unset_fake_temporarily():
            count = max(1, int(share * len(tensor))) if len(tensor) else 0
            return torch.arange(count)[:, None]

    def _answer(self) -> tuple[str, str]:
        """The place of LISTED that asks. Raises RuntimeError for any other."""
        places = [("/".join(path.parts[-2:]), name) for path, name in _callers()]
        for place in places:
            if place in LISTED:
                return place
        where = [":".join(place) for place in places[:6]]
        raise RuntimeError(f"a dry run cannot know a value that is asked for in {' < '.join(where)}: see fakes.LISTED")


def _real(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator's result, computed, if it is all integers and masks; else None."""
    if not (args or kwargs):
        return None
    with unset_fake_temporarily():
        out = func(*args, **kwargs)
    floats = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    return None if floats else out


def _as_numbers(index: Any) -> list[Tensor | None]:
    """Masks in an index as the places where they are true, whose number is then known."""
    numbers: list[Tensor | None] = []
    for part in index:
        if part is not None and part.dtype == torch.bool and not isinstance(part, FakeTensor):
            with unset_fake_temporarily():
                numbers += part.nonzero().unbind(1)
        else:
            numbers.append(part)
    return numbers


def _callers() -> Iterator[tuple[Path, str]]:
    frame: FrameType | None = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.parent != Path(__file__).parent:
            yield path, frame.f_code.co_name
        frame = frame.f_back


def _of_opener() -> bool:
    """Whether `_rows` was called for the indirect term."""
    frame: FrameType | None = sys._getframe(2)
    while frame and frame.f_code.co_name != "_rows":
        frame = frame.f_back
    return frame is not None and frame.f_locals["weight"] is frame.f_back.f_locals["weights"].indirect


@contextmanager
def fake_values(opener_share: float = 1.0) -> Iterator[None]:
    """Run the block on fake tensors."""
    for patch in (_random_states, _module_moves, _copies, _lists):
        patch()
    with FakeTensorMode(allow_non_fake_inputs=True), Answers(opener_share):
        yield


def _random_states() -> None:
    """A generator's state is a real tensor, which torch refuses to set under fake tensors; nothing is drawn here."""
    import megatron.core.tensor_parallel.random as tracker

    state = torch.get_rng_state()
    for module in (torch, torch.random, torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args, **kwargs: state
        module.set_rng_state = lambda *args, **kwargs: None
    tracker._get_cuda_rng_state = lambda *args, **kwargs: state
    tracker._set_cuda_rng_state = lambda *args, **kwargs: None


def _module_moves() -> None:
    """`Module.to` would swap a fake parameter's Python object for another, which optimizers and DDP then miss."""

    def apply(self: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        for module in self.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data = function(parameter.data)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = function(buffer)
        return self

    torch.nn.Module._apply = apply


def _copies() -> None:
    """A deep copy would copy a fake tensor's missing memory."""
    FakeTensor.__deepcopy__ = lambda self, memo: self.detach().clone()


def _lists() -> None:
    """`tolist` reads memory without an operator; element by element it asks `Answers`."""
    FakeTensor.tolist = lambda self: [x.tolist() for x in self.unbind()] if self.dim() else self.item()

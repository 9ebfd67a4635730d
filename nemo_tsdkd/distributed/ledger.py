"""What a piece of code holds and does, seen at its operators: bytes by storage, collectives by group, FLOPs, time.

Independent of every formula about them: it knows storages and operators, not models. Real and fake tensors count alike.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class Phase:
    """What happened in one phase.

    Attributes:
        at_begin: bytes at its begin, by label.
        peak: most bytes at one time, and `at_peak` what they were, by label.
        flops: of matrix products and attention.
        seconds: by a roofline: of each operator its FLOPs or its bytes, whichever take longer, but at least a kernel's.
        collectives: (group, operator) -> [calls, bytes of the largest tensor of each, summed].
    """

    at_begin: dict[str, int]
    peak: int
    at_peak: dict[str, int]
    flops: int = 0
    seconds: float = 0.0
    collectives: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Bytes at its begin."""
        return sum(self.at_begin.values())

    def as_json(self) -> dict[str, Any]:
        """The fields, with collectives as rows [group, operator, calls, bytes]."""
        return {**vars(self), "collectives": [[*key, *counts] for key, counts in sorted(self.collectives.items())]}


class Ledger(TorchDispatchMode):
    """Counts what operators in the `with` block make and move.

    A storage counts from the operator that first returns it until it is freed; touch inputs before and `reset()`, so
    that they do not count as new.

    Args:
        flops_per_s, bytes_per_s, kernel_s: a GPU's, for `Phase.seconds`.
    """

    def __init__(
        self, flops_per_s: float = float("inf"), bytes_per_s: float = float("inf"), kernel_s: float = 0.0
    ) -> None:
        super().__init__()
        self._speed = flops_per_s, bytes_per_s
        self._kernel_s = kernel_s
        self._sizes: dict[int, tuple[int, str]] = {}
        self._elsewhere: set[int] = set()  # storages of the host
        self._labels: Counter[str] = Counter()
        self._label: str | None = None
        self._in_kernel = False
        self._group_names: Mapping[str, str] = {}
        self.held = 0
        self.phases: dict[str, Phase] = {}
        self.enter("start")

    def enter(self, phase: str) -> None:
        """Begin or go on with a phase: what follows counts there, and is called by its name."""
        self._now = phase
        if phase not in self.phases:
            self.phases[phase] = Phase(self._by_label(), 0, {})
        self._note_peak()

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """The block is a phase of its own within the one that goes on afterwards."""
        before = self._now
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is allocated in the block goes by `name` instead of its phase's."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def labelled(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run under a label."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.label(name):
                return function(*args, **kwargs)

        return wrapped

    def on_host(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, whose result lies on the host and counts no more."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            key = out.untyped_storage()._cdata
            if key in self._sizes and key not in self._elsewhere:
                size, label = self._sizes[key]
                self._elsewhere.add(key)
                self._change(label, -size)
            return out

        return wrapped

    @property
    def peak(self) -> int:
        return self.phases[self._now].peak

    def reset(self) -> int:
        """Measure this phase anew; return what is held."""
        del self.phases[self._now]
        self.enter(self._now)
        return self.held

    def restart(self) -> None:
        """Forget all phases but what is held."""
        self.phases = {}
        self.enter(self._now)

    def name_groups(self, names: Mapping[str, str]) -> None:
        """Call process groups by these names, from their own ones (`ProcessGroup.group_name`)."""
        self._group_names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question such as `tensor.device`, asked for each operator
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._collective(func, args)
        if not self._in_kernel:
            made = self._add_all(out)
            if func._overloadpacket in flop_registry:
                self.work(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out), (args, out))
            elif not _is_view(func) and func.namespace != "c10d":
                self.work(0, (args, out) if args else made)
        return out

    def kernel(self, function: Callable[..., Any], flops: Callable[..., int] | None = None) -> Callable[..., Any]:
        """`function`, as if it were one kernel: what it returns counts, its own temporaries do not.

        Args:
            flops: of a call, from its arguments.
        """

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outer, self._in_kernel = self._in_kernel, True
            try:
                out = function(*args, **kwargs)
            finally:
                self._in_kernel = outer
            if not outer:
                self._add_all(out)
                self.work(flops(*args, **kwargs) if flops else 0, (args, kwargs, out))
            return out

        return wrapped

    def work(self, flops: int, tensors: Any) -> None:
        """Count an operator's FLOPs, and its time from these and the bytes of its tensors."""
        phase = self.phases[self._now]
        moved = sum(t.numel() * t.element_size() for t in _tensors(tensors))
        phase.flops += flops
        phase.seconds += max(flops / self._speed[0], moved / self._speed[1], self._kernel_s)

    def hold(self, tensors: Any) -> None:
        """Count tensors that no operator outside of a kernel returned."""
        self._add_all(tensors)

    def _collective(self, func: Any, args: Any) -> None:
        sizes = [t.numel() * t.element_size() for t in _tensors(args)]
        self.exchange(_group_of(args), func._overloadpacket.__name__.strip("_"), max(sizes, default=0))

    def exchange(self, group: str, operator: str, size: int) -> None:
        """Count a collective of `size` bytes over the group of this name of torch's."""
        key = self._group_names.get(group, group), operator
        entry = self.phases[self._now].collectives.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += size

    def _add_all(self, out: Any) -> list[Tensor]:
        tensors = _tensors(out)
        for tensor in tensors:
            self._add(tensor.untyped_storage())
        return tensors

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            weakref.finalize(storage, self._free, key).atexit = False
        elif known[0] == size:
            return
        before, label = known or (0, self._label or self._now)
        self._sizes[key] = size, label
        self._change(label, size - before)

    def _free(self, key: int) -> None:
        size, label = self._sizes.pop(key)
        if key in self._elsewhere:
            self._elsewhere.remove(key)
        else:
            self._change(label, -size)

    def _change(self, label: str, size: int) -> None:
        self._labels[label] += size
        self.held += size
        self._note_peak()

    def _note_peak(self) -> None:
        phase = self.phases[self._now]
        if self.held > phase.peak:
            phase.peak, phase.at_peak = self.held, self._by_label()

    def _by_label(self) -> dict[str, int]:
        return {label: size for label, size in self._labels.items() if size}


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested sequences and dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operator returns its argument's storage, or a new one that it leaves unwritten."""
    aliases = [r.alias_info for r in func._schema.returns]
    name = func._schema.name.removeprefix("aten::")
    return (
        "empty" in name
        or name in ("detach", "lift_fresh", "_unsafe_view")
        or any(alias is not None and not alias.is_write for alias in aliases)
    )


def _group_of(args: Any) -> str:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return torch.distributed.ProcessGroup.unbox(arg).group_name
    return "?"

"""What a CUDA graph demands of device work, checked without a GPU; see `nemo_tsdkd/megatron/rollout/graphs.py`.

`Recorder` writes down every operator of one run of a region: its shapes, its scalars, and the address of each tensor
that was born outside. `differences` of two runs says why a graph of the first would not repeat as the second.
`CpuCapture` stands where CUDA's capture does: it records a region's operators once, takes back what they changed, and
then replays the operators, and nothing else, into the same storages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

HOST_READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "tolist", "numpy", "cpu"}
HOST_READS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__"}
HOST_VALUES = {"lift_fresh"}  # torch.tensor([...]): the graph would copy one step's values for ever
SHAPED_BY_DATA = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _HostReads(TorchFunctionMode):
    """Reads that leave no trace among a CPU's operators: `tolist` takes what lies in memory."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in HOST_READS:
            self.faults.append(f"host read: {func.__name__}")
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records what runs inside of it.

    Attributes:
        operators: (name, shapes of the tensors given, scalars) of each.
        outside: (operator, address, shape, stride, dtype) of each tensor given that was not made inside.
        faults: host reads, host values and shapes that depend on data.
        calls: (function, args, kwargs, what it returned), which also keeps everything made inside alive, so that no
            address comes twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple] = []
        self.outside: list[tuple] = []
        self.faults: list[str] = []
        self.calls: list[tuple] = []
        self.made: dict[int, Tensor] = {}  # storage: a tensor over it
        self._reads = _HostReads(self.faults)

    def __enter__(self):
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, given = func._schema.name.split("::")[1], tensors((args, kwargs))
        scalars = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, int | float | bool)]
        for x in given:
            if storage(x) not in self.made and x.ndim == 0:
                scalars.append(x.item())  # a number that came as a tensor: a kernel's argument
            elif storage(x) not in self.made:
                self.outside.append((name, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype))
        self.operators.append((name, tuple(tuple(x.shape) for x in given), tuple(map(repr, scalars))))  # NaN too
        self.faults += self._faults(name, args)
        self.before(func, args, kwargs)
        out = func(*args, **kwargs)
        known = {storage(x) for x in given}
        for x in tensors(out):
            if storage(x) not in known:
                self.made[storage(x)] = x
        self.calls.append((func, args, kwargs, out))
        return out

    def before(self, func, args, kwargs) -> None: ...

    def _faults(self, name: str, args: tuple) -> list[str]:
        if name in HOST_VALUES and args[0].ndim == 0:
            return []  # `x[mask] = 0.0` makes one; compared as a scalar
        masks = []
        if name in ("index", "index_put", "index_put_"):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        if name != "index" and masks and len(tensors(args[1])) == 1 and args[2].numel() == 1:
            masks = []  # one value at a mask: torch fills
        kinds = (("host read", HOST_READS), ("host value", HOST_VALUES), ("shape by data", SHAPED_BY_DATA))
        return [f"{kind}: {name}" for kind, names in kinds if name in names] + ["shape by data: mask"] * bool(masks)


def differences(first: Recorder, second: Recorder) -> list[str]:
    """Why replaying `first` would not be `second`; nothing if it would."""
    found = [*first.faults, *second.faults]
    for a, b in zip(first.operators, second.operators, strict=False):
        if a != b:
            found.append(f"operator {a} became {b}")
            break
    if len(first.operators) != len(second.operators):
        found.append(f"{len(first.operators)} operators became {len(second.operators)}")
    for a, b in zip(first.outside, second.outside, strict=False):
        if a != b:
            found.append(f"{a[0]}'s tensor {a[2:]} moved to another address, or became {b[2:]}")
    return found


class _Tape(Recorder):
    """Also keeps what tensors born outside held before they were written."""

    def __init__(self) -> None:
        super().__init__()
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, func, args, kwargs) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors(value):
                    if storage(x) not in self.made and storage(x) not in self.overwritten:
                        raw = _bytes(x)
                        self.overwritten[storage(x)] = (raw, raw.clone())


class CpuCapture:
    """From a region to the replay of its operators, as `graphs.CudaCapture`.

    As on CUDA, capturing changes nothing, and what was made inside a region is worthless outside: it is overwritten
    after each replay. Collectives are operators like others.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, region: Callable[[], None]) -> Callable[[], None]:
        with _Tape() as tape:
            region()
        for raw, before in tape.overwritten.values():
            raw.copy_(before)
        self._spoil(tape)
        self.captures += 1
        return lambda: self._replay(tape)

    def _replay(self, tape: _Tape) -> None:
        self.replays += 1
        for func, args, kwargs, out in tape.calls:
            aliases = [r.alias_info for r in func._schema.returns]
            if func.namespace == "c10d":
                *_, work = func(*args, **kwargs)
                dist.Work.unbox(work).wait()
            elif all(a is not None and not a.is_write for a in aliases):
                continue  # a view: it lies where it lay
            else:
                again = func(*args, **kwargs)
                if all(a is None for a in aliases):
                    for x, y in zip(tensors(out), tensors(again), strict=True):
                        x.copy_(y)
        self._spoil(tape)

    def _spoil(self, tape: _Tape) -> None:
        for x in tape.made.values():
            _bytes(x).fill_(255)


def _bytes(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())

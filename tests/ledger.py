"""What tensors a piece of code holds, counted by their storages: independent of every formula about them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Bytes of the storages that were made, or first touched, in the `with` block: now (`held`) and at most (`peak`).

    Touch inputs before and `reset()`, so that they do not count as new.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._in_kernel = False
        self.held = self.peak = 0

    def reset(self) -> int:
        """Measure the peak anew; return what is held."""
        self.peak = self.held
        return self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._in_kernel:
            self._add_all(out)
        return out

    def kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, as if it were one kernel: what it returns counts, its own temporaries do not."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outer, self._in_kernel = self._in_kernel, True
            try:
                out = function(*args, **kwargs)
            finally:
                self._in_kernel = outer
            self._add_all(out)
            return out

        return wrapped

    def _add_all(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

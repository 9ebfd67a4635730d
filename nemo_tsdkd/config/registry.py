"""Functions by the name that a configuration uses. A module registers what it defines when it is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nemo_tsdkd.config.validation import UserError

F = TypeVar("F", bound=Callable)


class Registry(dict[str, F]):
    """`kind` names what is registered, for messages."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that registers a function under `name`. Raises ValueError where the name is taken."""

        def register(function: F) -> F:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered twice. Choose another name.")
            self[name] = function
            return function

        return register

    def require(self, field: str, name: str) -> None:
        """Raise UserError unless `name`, the value of `field`, is registered."""
        if name not in self:
            known = ", ".join(sorted(self)) or "(none is registered)"
            raise UserError(
                f"{field} = {name!r}: must be one of {known}. "
                f"Choose one of these, or register the {self.kind} (CONTRIBUTING.md)."
            )

"""What a verifier is, and the registry of all. No torch: verifiers run in a process of their own (`judge.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from nemo_tsdkd.config.registry import Registry
from nemo_tsdkd.config.validation import UserError

NONE = "none"  # in place of a verifier: responses are not judged


@dataclass(frozen=True)
class Verdict:
    """On one response. One that the verifier failed on is wrong, and `error` says why it failed."""

    correct: bool
    answer: str | None  # what the response answers; None where no answer is found in it
    expected: str
    error: str | None = None


class Verifier(Protocol):
    """Registered by `verifier(name)`, or with the package it needs: `verifier(name, package=..., extra=...)`."""

    def reference(self, value: Any) -> Any:
        """What a response is compared with, from the row's value in `validation.answer_column`; JSON can hold it.

        Raises:
            ValueError: what the value must be.
        """

    def judge(self, response: str, reference: Any) -> Verdict:
        """The verdict on a response without its special tokens. What it raises becomes the verdict's `error`."""


@dataclass(frozen=True)
class Registered:
    """A verifier's constructor, and the package that it needs besides this one's own, with the extra that has it."""

    make: Callable[[], Verifier]
    package: str | None
    extra: str | None


VERIFIERS: Registry[Registered] = Registry("verifier")  # type: ignore[type-var]


def verifier(name: str, *, package: str | None = None, extra: str | None = None) -> Callable[[type], type]:
    """Decorator that registers a class of verifiers under `name`."""

    def register(made: type) -> type:
        VERIFIERS.register(name)(Registered(made, package, extra))  # type: ignore[type-var]
        return made

    return register


def require_verifier(field: str, name: str) -> None:
    """Raise UserError unless `name`, the value of `field`, is `none` or a verifier whose package is installed."""
    if name == NONE:
        return
    VERIFIERS.require(field, name)
    needs = VERIFIERS[name]
    if needs.package and find_spec(needs.package) is None:
        raise UserError(f"{field} = {name!r}: needs {needs.package}. pip install 'nemo-tsdkd[{needs.extra}]'.")


def text_reference(value: Any) -> str:
    """A row's answer as text; a number is one, too. Raises ValueError for anything else, and for empty text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text or a number, and not empty")
    return value

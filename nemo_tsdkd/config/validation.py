"""Errors of the user, and checks of a configuration's fields that raise them; `prefix` is the section of a field."""

from __future__ import annotations

import errno
import math
import numbers
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from nemo_tsdkd.config.integers import round_up


class UserError(ValueError):
    """Bad input that the user can correct: the command prints its message alone and exits with status 2.

    Any other exception, a plain ValueError included, is a defect of the program and keeps its traceback.
    """


class HostError(RuntimeError):
    """What the machine refuses: a full disk, a lost mount, a port in use. The command prints its message alone and
    exits with status 1, by which a job script knows that the same command may succeed on another try."""


_OF_THE_HOST = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "ENODEV", "ENOTCONN", "EADDRINUSE", "ENOMEM", "EMFILE")
_HOST_ERRNOS = {getattr(errno, name) for name in _OF_THE_HOST}


def is_of_the_host(error: BaseException) -> bool:
    """Whether an error says that a disk, a mount, a port or memory is not there, or no longer."""
    return isinstance(error, OSError) and error.errno in _HOST_ERRNOS


def require(ok: bool, name: str, value: Any, rule: str, fix: str) -> None:
    """Raise the one shape of error a user ever sees for a bad field."""
    if not ok:
        raise UserError(f"{name} = {value!r}: {rule}. {fix}")


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    require(value in allowed, name, value, f"must be one of {', '.join(map(str, allowed))}", "Choose one of these.")


def types(owner: Any, prefix: str) -> None:
    """Every plain field has the type that its dataclass names; where it names a float, an integer does too."""
    kinds = {"int": numbers.Integral, "float": numbers.Real, "str": str, "bool": bool}
    for field in fields(owner):
        value, kind = getattr(owner, field.name), kinds.get(str(field.type))
        fits = kind is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
        require(fits, f"{prefix}{field.name}", value, f"must be of type {field.type}", "Give one.")


def positive(owner: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{prefix}{name}", value, "must be greater than 0", "Give a positive number.")
        require(value < math.inf, f"{prefix}{name}", value, "must be finite", "Give a positive number.")


def not_negative(owner: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{prefix}{name}", value, "must not be negative", "Give 0 or more.")
        require(value < math.inf, f"{prefix}{name}", value, "must be finite", "Give 0 or more.")


def multiple_of(name: str, value: int, multiple: int, what: str, why: str = "") -> None:
    """`what` names the multiple in the message, `why` may follow it."""
    rule = f"must be a multiple of {what} = {multiple}{why}"
    require(value % multiple == 0, name, value, rule, f"Use {round_up(value, multiple)}.")


def share(owner: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(0.0 <= value <= 1.0, f"{prefix}{name}", value, "must lie in [0, 1]", "Give a share between 0 and 1.")

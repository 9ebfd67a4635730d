"""The stack of an image: what of it must stay (`compiled`), and whether it is what the package asks for (`check`).

`pip check` would also judge the image's other packages, and knows no optional dependencies. Neither command imports a
package of the stack: a build has no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COMPILED = {"torch", "torchvision", "torchaudio", "torchao", "triton", "pytorch-triton", "flash-attn", "apex"}


def compiled() -> list[str]:
    """`name==release` of what was compiled for the image's CUDA and is not to be replaced."""
    found = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    return [f"{n}=={v}" for n, v in sorted(found.items()) if n in COMPILED or n.startswith("transformer-engine")]


def violations(package: str, extras: frozenset[str], alone: bool = False) -> list[str]:
    """Requirements of a package, and of all that it requires, that do not hold.

    Args:
        package: an installed distribution.
        extras: its optional groups that count.
        alone: only its own requirements, not those of what it requires.
    """
    seen: set[tuple[str, frozenset[str]]] = set()

    def walk(package: str, extras: frozenset[str]) -> Iterator[str]:
        if (package, extras) in seen:
            return
        seen.add((package, extras))
        for needed in map(Requirement, requires(package) or ()):
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            try:
                found = version(needed.name)
            except PackageNotFoundError:
                yield f"{package} needs {needed}, which is not installed"
                continue
            if not needed.specifier.contains(found, prereleases=True):
                yield f"{package} needs {needed}, but {found} is installed"
            if not alone:
                yield from walk(needed.name, frozenset(needed.extras))

    return list(walk(package, extras))


def check() -> list[str]:
    """All that is wrong. Transformer Engine's own requirements are the image's affair: it splits and names it anew."""
    closure = violations("nemo-tsdkd", frozenset({"evaluate", "test"}))
    return closure + [line for line in violations("nemo-tsdkd", frozenset({"gpu"}), alone=True) if line not in closure]


if __name__ == "__main__":
    lines = {"compiled": compiled, "check": check}[sys.argv[1]]()
    print(*lines, sep="\n")
    if sys.argv[1] == "check":
        sys.exit(bool(lines))

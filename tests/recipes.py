"""The code blocks of CONTRIBUTING.md, applied to a copy of the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"(?:^`(?P<path>[\w./]+)`:\n\n)?^```(?P<kind>python|diff)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


def sections() -> dict[str, list[re.Match]]:
    """The blocks of each recipe, by its title."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    titles = re.split(r"^### (.*)\n", text.split("\n## Recipes\n")[1].split("\n## ")[0], flags=re.MULTILINE)
    return {title: list(_BLOCK.finditer(body)) for title, body in zip(titles[1::2], titles[2::2], strict=True)}


def copy_package(target: Path) -> Path:
    for name in ("nemo_tsdkd", "conf"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def apply(block: re.Match, root: Path) -> None:
    """Write the new file, or change the file that a diff names: its old lines must stand there exactly once."""
    if block["kind"] == "python":
        path = root / block["path"]
        assert not path.exists(), path
        path.write_text(block["body"])
        return
    head, *lines = block["body"].splitlines()
    assert head.startswith("--- "), head
    path = root / head.removeprefix("--- ")
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in keep) for keep in (" -", " +"))
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new))

"""Transformer Engine's pure wheel, at a pinned version and hash, unzipped into the checkout's `.cache/`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "2.11.0"  # the newest that the project's range allows
SHA256 = "7ee1eae8fa6b0cb471c6066aa3555304fda8537174e5019929dc0c8655071df3"
CACHE = Path(__file__).parents[3] / ".cache"
FOLDER = CACHE / f"transformer_engine-{VERSION}"  # holds the package and its dist-info


class Unavailable(Exception):
    """The wheel is neither here nor to be had."""


def fetch() -> Path:
    """The folder of the unzipped wheel, downloaded at the first call; pip refuses another hash.

    Raises:
        Unavailable: pip got no such wheel.
    """
    if FOLDER.is_dir():
        return FOLDER
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pin = Path(folder, "requirements.txt")
        pin.write_text(f"transformer-engine=={VERSION} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", f"--requirement={pin}", f"--dest={folder}"]
        got = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"})
        wheels = list(Path(folder).glob("*.whl"))
        if got.returncode or len(wheels) != 1:
            raise Unavailable(got.stderr[-500:])
        unzipped = Path(folder, "unzipped")
        zipfile.ZipFile(wheels[0]).extractall(unzipped)
        shutil.rmtree(FOLDER, ignore_errors=True)
        unzipped.rename(FOLDER)  # whole, or not there
    return FOLDER

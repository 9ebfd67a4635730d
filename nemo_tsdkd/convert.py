"""`nemo-tsdkd import`: conversions between Hugging Face and NeMo folders."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_tsdkd.folders import require_importable
from nemo_tsdkd.integrity import appearing_folder


def import_main(argv: Sequence[str] | None = None) -> None:
    """`nemo-tsdkd import --source HF --output DIR`: a Hugging Face folder to a NeMo checkpoint."""
    parser = argparse.ArgumentParser(prog="nemo-tsdkd import", description=import_main.__doc__)
    parser.add_argument("--source", type=Path, required=True, help="local Hugging Face folder with safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)
    require_importable(args.source)
    _require_absent(args.output)
    with appearing_folder(args.output) as folder:
        from nemo_tsdkd.megatron.hf import import_hf  # here: bad input is told before the long import of NeMo

        import_hf(args.source, folder)
    print(args.output)


def _require_absent(output: Path) -> None:
    if output.exists():
        raise ValueError(f"--output = {output}: must not exist. Remove it or choose another folder.")

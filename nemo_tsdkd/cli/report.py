"""`nemo-tsdkd report`: one HTML file of one run or of several side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_tsdkd.reporting.report import REPORT, build_report


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="nemo-tsdkd report", description=f"Write {REPORT} and print its path.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run_dir of a run; several are drawn as one")
    where = f"default: {REPORT} in the run's folder, or in the current folder for several runs"
    parser.add_argument("--output", type=Path, help=f"the file to write ({where})")
    args = parser.parse_args(argv)
    folder = args.runs[0] if len(args.runs) == 1 else Path()
    print(build_report(args.runs, args.output or folder / REPORT))

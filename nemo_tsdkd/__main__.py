"""`python -m nemo_tsdkd` is the console script."""

from nemo_tsdkd.cli.main import run

run()

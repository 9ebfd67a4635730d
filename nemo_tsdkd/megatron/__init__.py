"""Adapters to Megatron-core and NeMo. Importing this package first puts the CPU stand-in in place (`cpu.py`)."""

from nemo_tsdkd import cpu

cpu.install()

import nemo.collections.llm  # noqa: E402, F401  the stand-in's second half needs NeMo imported

cpu.install_nemo()

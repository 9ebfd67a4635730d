"""Adapters to Megatron-core and NeMo. Importing this package first puts the CPU stand-in in place (`cpu.py`)."""

import atexit
import gc

from nemo_tsdkd import cpu

# NeMo brings 8,500 modules. Python's collector would walk their growing million of objects again and again, for a
# quarter of the time this takes and later in the middle of a step, and there is nothing to collect.
_collects = gc.isenabled()
gc.disable()

cpu.install()

import nemo.collections.llm  # noqa: E402, F401  the stand-in's second half needs NeMo imported

cpu.install_nemo()

gc.freeze()
atexit.register(gc.unfreeze)  # some libraries take what is never collected for a leak, and say so at the end
if _collects:
    gc.enable()

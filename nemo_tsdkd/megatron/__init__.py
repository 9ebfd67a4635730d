"""Adapters to Megatron-core and NeMo. Importing this package first puts the CPU stand-in in place (`cpu.py`)."""

import atexit
import gc

import nemo_tsdkd.megatron.cpu as cpu

# NeMo's import makes a million objects in 8,500 modules. Python's collector would walk them again and again, for a
# quarter of the time the import takes, and find nothing to free; frozen, they stay out of its way in training, too.
_collects = gc.isenabled()
gc.disable()

cpu.install()

import nemo.collections.llm  # noqa: E402, F401  the stand-in's second half needs NeMo imported

cpu.install_nemo()

from nemo_tsdkd.megatron.checkpoints import unpickling  # noqa: E402

unpickling.install()

gc.freeze()
atexit.register(gc.unfreeze)  # some libraries take what is never collected for a leak, and say so at the end
if _collects:
    gc.enable()

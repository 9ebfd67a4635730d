"""Imported by the fork server of `tests/engine` in place of the stack: the stack over Transformer Engine."""

import sys

from te_stand_in import patches, wheel

sys.path.insert(0, str(wheel.FOLDER))
patches.before_megatron()

import nemo_tsdkd.megatron.train  # noqa: E402, F401  the whole stack

patches.after_megatron()

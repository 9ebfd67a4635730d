"""The cases that a GPU runs with Transformer Engine's kernels, over their stand-in."""

from engine_cases import *  # noqa: F403

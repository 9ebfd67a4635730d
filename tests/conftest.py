"""Collects which import the ranks' fork server needs; see ranks.py."""

import ranks

STACK_FOLDERS = {"stack", "e2e", "slurm"}


def pytest_collection_modifyitems(items):
    if any(STACK_FOLDERS & set(item.path.parts) for item in items):
        ranks.PRELOAD = ["torch", "nemo_tsdkd.megatron.train"]

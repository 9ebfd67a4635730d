"""Collects which import the ranks' fork server needs; see ranks.py."""

import pytest
import ranks

pytest.register_assert_rewrite("engine_cases")

STACK_FOLDERS = {"stack", "e2e", "slurm"}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name == "engine")  # last: they take another fork server
    if any(STACK_FOLDERS & set(item.path.parts) for item in items):
        ranks.PRELOAD = ["torch", "pytest", "nemo_tsdkd.megatron.train"]

"""Models are imported once for all tests of this folder."""

import pytest
import tiny_run


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Folder with a tiny student, a teacher and data (`tiny_run.prepare`)."""
    return tiny_run.prepare(tmp_path_factory.mktemp("models"))

"""The headers of safetensors files: every way in which a folder's weights may be incomplete has its own message."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from nemo_tsdkd.checkpoints.tensor_files import INDEX, SINGLE, stored_tensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards with their index."""
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)}, tmp_path / FIRST)
    save_file({"c": np.zeros((), np.float32)}, tmp_path / SECOND)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}))
    return tmp_path


def test_names_dtypes_and_shapes_come_from_every_shard(shards):
    found = {name: (t.file.name, t.dtype, t.shape) for name, t in stored_tensors(shards).items()}
    assert found == {"a": (FIRST, "F32", (3, 4)), "b": (FIRST, "F16", (5,)), "c": (SECOND, "F32", ())}


def test_a_single_file_is_read_without_an_index(shards):
    save_file({"d": np.zeros(2, np.float32)}, shards / SINGLE)  # transformers prefers it to the index
    assert stored_tensors(shards).keys() == {"d"}


def index_says(**change):
    def apply(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= change
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def cut(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-4])


BROKEN = {
    "cut off": (cut, f"{FIRST}: not a complete safetensors file"),
    "not safetensors": (
        lambda f: (f / FIRST).write_text("<html>404 Not Found</html>"),
        "not a complete safetensors file",
    ),
    "shard absent": (lambda f: (f / SECOND).unlink(), f"{SECOND}: is named in {INDEX}"),
    "shard elsewhere": (index_says(c="../c.safetensors"), "is named in"),
    "tensor absent": (index_says(e=SECOND), f"{SECOND}: does not hold e"),
    "tensor in another shard": (index_says(b=SECOND), f"{FIRST}: holds b, which {INDEX} does not list there"),
    "tensor twice": (lambda f: save_file({"a": np.zeros(1), "c": np.zeros(1)}, f / SECOND), f"{SECOND}: holds a, as"),
    "no index": (lambda f: (f / INDEX).unlink(), "has neither"),
    "index of another kind": (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), "weight_map"),
    "index broken": (lambda f: (f / INDEX).write_text("{"), "not readable as JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_named(kind, shards):
    spoil, reason = BROKEN[kind]
    spoil(shards)
    with pytest.raises(ValueError) as error:
        stored_tensors(shards)
    assert type(error.value).__name__ == "UserError" and reason in str(error.value)


def test_reading_headers_needs_no_torch():
    check = "import sys, nemo_tsdkd.checkpoints.tensor_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)

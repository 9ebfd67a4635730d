"""A model folder is known by its content, and its assets travel without its weights."""

import json
from pathlib import Path

import pytest

from nemo_tsdkd.checkpoints.atomic import read_json
from nemo_tsdkd.checkpoints.foreign import require_safe
from nemo_tsdkd.checkpoints.model_folder import content_key, copy_assets
from nemo_tsdkd.config.validation import UserError

FILES = {
    "config.json": '{"model_type": "qwen2"}',
    "tokenizer.json": "{}",
    "tokenizer.model": "pieces",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "model-00001-of-00002.safetensors": "w" * 100,
    "model-00002-of-00002.safetensors": "v" * 100,
    "model.safetensors.index.json": "{}",
    "modeling.py": "print()",
    "README.md": "words",
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", *list(FILES)[5:7]])
def test_the_key_changes_with_every_byte_that_matters(name, folder):
    key = content_key(folder)
    text = (folder / name).read_text()
    (folder / name).write_text(text[:-1] + chr(ord(text[-1]) ^ 1))  # the same length
    assert content_key(folder) != key


def test_the_key_does_not_change_with_time_place_or_words(folder):
    key = content_key(folder)
    (folder / "README.md").write_text("other words")
    moved = folder.rename(folder.parent / "elsewhere")
    for path in moved.iterdir():
        path.touch()
    assert content_key(moved).rpartition("-")[2] == key.rpartition("-")[2]


def test_renaming_a_shard_changes_the_key(folder):
    key = content_key(folder)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model-00003-of-00002.safetensors")
    assert content_key(folder) != key


def test_assets_are_copied_without_weights_code_or_index(folder, tmp_path):
    copy_assets(folder, tmp_path / "assets")
    copied = {path.name for path in (tmp_path / "assets").iterdir()}
    assert copied == {"config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"}


def test_links_stay_inside_the_folder_or_the_cache_it_lies_in(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    blob = (snapshot / "tokenizer.json").rename(tmp_path / "models--a--b" / "blobs" / "4567")
    (snapshot / "tokenizer.json").symlink_to(Path("..", "..", "blobs", "4567"))  # as huggingface_hub writes it
    (snapshot / "again.json").symlink_to("tokenizer.json")
    require_safe(snapshot)
    (tmp_path / "linked").symlink_to(snapshot)  # the folder itself may be one
    require_safe(tmp_path / "linked")
    secret = blob.rename(tmp_path / "secret")
    (snapshot / "other.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"other.json: is a link to .*secret, outside of the model's folder"):
        require_safe(snapshot)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_broken_json_is_named(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(path)
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path) == {"a": 1}

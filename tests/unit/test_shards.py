"""Shards of responses: complete or absent, continued only with their first settings, read by the trainer."""

import json

import pytest
from tiny_hf import save_tokenizer

from nemo_tsdkd.config.schema import DataConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.dataset import PromptDataset
from nemo_tsdkd.data.response_shards import FORMATS, Shards
from nemo_tsdkd.data.tokenizer import Vocabulary, load_tokenizer, response_text


def config(**changes):
    c = TrainConfig(run_dir="run", seed=changes.get("seed", 1))
    c.student.path, c.teacher.path, c.data.path = "s", changes.get("teacher", "t"), "d"
    c.rollout.temperature = changes.get("temperature", 1.0)
    return c


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_missing_and_where_each_row_goes(tmp_path, format):
    shards = Shards(tmp_path / "out", format, 4)
    shards.claim(config(), "teacher", 10, 2)
    assert shards.missing(10) == [0, 1, 2]
    assert [list(shards.rows_of(i, 10)) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shards.write(1, [{"index": 4, "response_ids": [1, 2], "truncated": False}])
    assert shards.missing(10) == [0, 2]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"responses-00001.{format}", "settings.json"]


def test_a_write_that_fails_leaves_no_shard(tmp_path, monkeypatch):
    shards = Shards(tmp_path, "jsonl", 4)

    def full_disk(path):
        raise OSError("no space left")

    monkeypatch.setattr("nemo_tsdkd.checkpoints.atomic.sync", full_disk)
    with pytest.raises(OSError, match="no space"):
        shards.write(0, [{"index": 0}])
    assert shards.missing(4) == [0]


@pytest.mark.parametrize(
    ("rows", "copies", "size"), [(1000, 8, 125), (9 * 1024, 8, 576), (300_000, 4, 1014), (3, 8, 1), (700, 1, 700)]
)
def test_every_copy_of_the_model_has_as_many_files_and_none_is_large(tmp_path, rows, copies, size):
    shards = Shards(tmp_path, "jsonl")
    shards.claim(config(), "teacher", rows, copies)
    assert shards.size == size
    goes_on = Shards(tmp_path, "jsonl")
    goes_on.claim(config(), "teacher", rows, copies + 1)
    assert goes_on.size == size


@pytest.mark.parametrize("field", ["batch_size", "lmbda", "reuse", "sync_every"])
def test_what_no_response_depends_on_may_change(tmp_path, field):
    Shards(tmp_path, "jsonl").claim(config(), "teacher", 10, 1)
    changed = config()
    setattr(changed.rollout, field, 0)
    Shards(tmp_path, "jsonl").claim(changed, "teacher", 10, 1)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"teacher": "u"}, {"temperature": 0.5}])
def test_a_folder_keeps_its_settings(tmp_path, changes):
    shards = Shards(tmp_path, "jsonl", 4)
    shards.claim(config(), "teacher", 10, 2)
    shards.claim(config(), "teacher", 10, 2)
    with pytest.raises(ValueError, match="was written with"):
        shards.claim(config(**changes), "teacher", 10, 2)
    with pytest.raises(ValueError, match="was written with model"):
        shards.claim(config(), "student", 10, 2)
    with pytest.raises(ValueError, match="was written with shards"):
        Shards(tmp_path, "jsonl", 5).claim(config(), "teacher", 10, 2)


@pytest.mark.parametrize("format", FORMATS)
def test_the_trainer_reads_the_tokens_that_were_sampled(tmp_path, monkeypatch, format):
    """Not those the text has: a truncated response has no EOS, and sampled tokens may spell a word in pieces."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    pieces = [tokenizer.convert_tokens_to_ids(c) for c in "boxes"]
    assert tokenizer("boxes")["input_ids"] != pieces
    written = [(pieces, True), ([*pieces, tokenizer.eos_token_id], False), ([tokenizer.eos_token_id], False)]
    records = [
        {
            "index": i,
            "prompt": f"Ann has {i}",
            "response": response_text(tokenizer, ids),
            "response_ids": ids,
            "truncated": truncated,
        }
        for i, (ids, truncated) in enumerate(written)
    ]
    shards = Shards(tmp_path / "out", format, 2)
    shards.claim(config(), "teacher", len(records), 2)
    shards.write(0, records[:2])
    data = DataConfig(path=str(tmp_path / "out"), seq_length=64)
    vocabulary = Vocabulary.of(tokenizer, tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=rf"`generate` has not ended, 1 files .*responses-00001\.{format}"):
        PromptDataset.load(data, tokenizer, vocabulary)
    shards.write(1, records[2:])
    read = PromptDataset.load(data, tokenizer, vocabulary)
    assert [sample.response_ids for sample in read] == [ids for ids, _ in written]
    assert [read.prompt(i) for i in range(3)] == ["Ann has 0", "Ann has 1", "Ann has 2"]


def test_tokens_of_another_tokenizer_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tokenizer(tmp_path / "tokenizer")
    row = {"prompt": "Ann", "response": "boxes", "response_ids": [5, 6]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(path=str(tmp_path / "a.jsonl"), seq_length=64)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"line 1: response_ids are not the tokens of 'response'"):
        PromptDataset.load(data, tokenizer, Vocabulary.of(tokenizer, tmp_path / "tokenizer"))

"""samples.jsonl: text that reads as the model wrote it, numbers of four digits, and one file over a resume."""

import json

import pytest
import tiny_hf

from nemo_tsdkd.data.tokenizer import load_tokenizer
from nemo_tsdkd.reporting.rows import read_samples
from nemo_tsdkd.reporting.samples import SamplesWriter, token_texts

TEXT = "Ann has 3 boxes, 12 eggs 🥚 naïve 東京"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_hf.save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return load_tokenizer(folder)


def sample(tokenizer, step, text=TEXT, **fields):
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    columns = {"student_entropy": [0.123456789] * len(ids), "opener": [True] * len(ids)}
    columns |= {"divergence": [float("inf")] * len(ids)}
    return {
        "step": step,
        "kind": "train",
        "index": 3,
        "prompt_ids": tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True),
        "response_ids": ids,
        "truncated": False,
        "on_policy": True,
        "verdict": None,
        "tokens": columns,
    } | fields


def test_each_token_shows_what_it_adds(tokenizer):
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == TEXT + "<|im_end|>" and len(texts) == len(ids)
    assert texts[-1] == "<|im_end|>" and texts[0] in TEXT and "🥚" in texts
    assert texts.count("") >= 3  # the egg's four bytes are four tokens here: the last one completes it
    assert token_texts(tokenizer, []) == []
    cut = token_texts(tokenizer, tokenizer("🥚")["input_ids"][:2])
    assert cut[0] == "" and cut[1].startswith("�")  # a response that a limit cut within a character


def test_a_written_sample_is_strict_json_that_reads_as_the_model_saw_it(tokenizer, tmp_path):
    SamplesWriter(tmp_path, tokenizer, 0).write(sample(tokenizer, 2))
    line = (tmp_path / "samples.jsonl").read_text()
    assert "Infinity" not in line and "🥚" in line
    (row,) = read_samples(tmp_path / "samples.jsonl")
    assert row["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" and row["response"] == TEXT
    assert {len(column) for column in row["tokens"].values()} == {len(row["tokens"]["text"])}
    assert row["tokens"]["student_entropy"][0] == 0.1235 and row["tokens"]["opener"][0] is True
    assert row["tokens"]["divergence"][0] is None


def test_a_resumed_run_leaves_the_same_file(tokenizer, tmp_path):
    for name, parts in {"whole": [(0, [0, 2, 4, 6])], "killed": [(0, [0, 2, 4, 6]), (4, [6])]}.items():
        for resume_step, steps in parts:
            (tmp_path / name).mkdir(exist_ok=True)
            writer = SamplesWriter(tmp_path / name, tokenizer, resume_step)
            for step in steps:
                writer.write(sample(tokenizer, step))
            if name == "killed" and not resume_step:
                with writer.path.open("a") as file:
                    file.write('{"step": 6, "pro')  # in the middle of a line
    assert (tmp_path / "killed/samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
    SamplesWriter(tmp_path / "whole", tokenizer, 0)  # the run begins again
    assert (tmp_path / "whole/samples.jsonl").read_bytes() == b""


def test_lines_that_are_no_samples_are_skipped_with_a_warning(tmp_path, caplog):
    good = {"step": 1, "tokens": {}}
    lines = [json.dumps(good), "[" * 10**5, "{}", '{"step": "1", "tokens": {}}', "\0\0", '"text"', json.dumps(good)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    assert read_samples(tmp_path / "samples.jsonl") == [good, good]
    assert [record.args[1] for record in caplog.records] == [2, 3, 4, 5, 6]

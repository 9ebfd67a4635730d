"""Reading, checking, tokenizing and ordering of prompts; cutting sequences into micro-batches."""

import json
import logging

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from nemo_tsdkd.config.schema import DataConfig
from nemo_tsdkd.data.dataset import EpochOrder, PromptDataset, Sample
from nemo_tsdkd.data.global_batch import GlobalBatch
from nemo_tsdkd.data.tokenizer import Vocabulary, check_same_tokenizer, load_tokenizer

WORDS = ["<pad>", "<eos>", "<end>", "<unk>", "user:", "bot:", "one", "two", "three", "four"]
TEMPLATE = "user: {{ messages[0]['content'] }} {% if add_generation_prompt %}bot:{% endif %}"
EOS, UNK, USER, BOT, ONE, TWO, THREE = 1, 3, 4, 5, 6, 7, 8


def make_tokenizer(words=WORDS, chat_template=TEMPLATE, **special):
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def load(path, tokenizer, need_response=False, **fields):
    config = DataConfig(path=str(path), **{"seq_length": 64, **fields})
    return PromptDataset.load(config, tokenizer, Vocabulary.of(tokenizer, "nowhere") if need_response else None)


def test_template_eos_and_columns(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl", {"prompt": "one", "response": "two"}, {"instruction": "three", "response": "one"}
    )
    assert list(load(path, tokenizer, need_response=True)) == [
        Sample(0, [USER, ONE, BOT], [TWO, EOS]),
        Sample(1, [USER, THREE, BOT], [ONE, EOS]),
    ]
    assert load(path, tokenizer)[0].response_ids == []
    assert load(path, tokenizer, apply_chat_template=False)[0].prompt_ids == [ONE]


CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}bot:"


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_chats_are_read_as_their_text_and_come_back_as_they_were(tmp_path):
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    chats = [chat(("user", "one")), chat(("user", "one"), ("assistant", "two"), ("user", "three"))]
    path = write(tmp_path / "a.jsonl", *({"prompt": prompt} for prompt in [*chats, "one"]))
    pd.DataFrame({"prompt": chats}).to_parquet(tmp_path / "a.parquet")
    data = load(path, tokenizer)
    expected = tokenizer("user: one assistant: two user: three bot:")["input_ids"]
    assert data[1].prompt_ids == expected and data[0].prompt_ids == data[2].prompt_ids
    assert [data.prompt(i) for i in range(3)] == [*chats, "one"]
    parquet = load(tmp_path / "a.parquet", tokenizer)
    assert list(parquet) == list(data)[:2] and [parquet.prompt(i) for i in range(2)] == chats


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"has messages of the roles \[\]"),
        (chat(("user", "one"), ("assistant", "two")), "and the last of the user"),
        (chat(("tool", "one"), ("user", "two")), "must be of system, user and assistant"),
        (["one"], "message 1 is 'one': must hold role and content"),
        ([{"role": "user", "content": 5}], "message 1 is .*: must hold role and content, both text"),
        ([{"role": "user", "content": "one", "name": "Ann"}], "and nothing else"),
        (chat(("user", "\udc80")), "message 1 holds '.udc80' at character 0: not a character"),
    ],
)
def test_a_bad_chat_is_named_by_file_and_line(tmp_path, tokenizer, prompt, message):
    path = write(tmp_path / "bad.jsonl", {"prompt": chat(("user", "one"))}, {"prompt": prompt})
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: prompt:? ?.*{message}"):
        load(path, tokenizer)


def test_a_chat_needs_the_template(tmp_path, tokenizer):
    path = write(tmp_path / "bad.jsonl", {"prompt": chat(("user", "one"))})
    with pytest.raises(ValueError, match=r"list of chat messages.*Set data.apply_chat_template=true"):
        load(path, tokenizer, apply_chat_template=False)


def test_prompts_that_look_like_dates_stay_text(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "2020-01-01"}, {"prompt": "one\u2028two"})
    data = load(path, tokenizer, apply_chat_template=False)
    assert [s.prompt_ids for s in data] == [[UNK], [ONE, TWO]]


def test_parquet_and_folder_equal_jsonl(tmp_path, tokenizer):
    rows = [{"prompt": w, "response": "one"} for w in ("one", "two", "three", "four")]
    jsonl = write(tmp_path / "a.jsonl", *rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards" / "0.jsonl", *rows[:1])
    write(tmp_path / "shards" / "1.jsonl", *rows[1:])
    want = list(load(jsonl, tokenizer, need_response=True))
    assert list(load(tmp_path / "a.parquet", tokenizer, need_response=True)) == want
    assert list(load(tmp_path / "shards", tokenizer, need_response=True)) == want
    assert list(load(tmp_path / "shards", tokenizer, need_response=True, limit=3)) == want[:3]


def test_changed_file_is_read_anew(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "one"})
    assert len(load(path, tokenizer)) == 1
    write(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "two"})
    assert len(load(path, tokenizer)) == 2


def test_what_does_not_fit_is_dropped_and_counted(tmp_path, tokenizer, caplog):
    rows = [("one " * n, "two " * m) for n, m in ((7, 1), (8, 1), (6, 1), (2, 5), (2, 6))]
    path = write(tmp_path / "a.jsonl", *({"prompt": p, "response": r} for p, r in rows))
    fields = {"seq_length": 8, "apply_chat_template": False}
    caplog.set_level(logging.INFO)
    on_policy = load(path, tokenizer, **fields)
    assert ([len(s.prompt_ids) for s in on_policy], on_policy.dropped) == ([7, 6, 2, 2], 1)
    off_policy = load(path, tokenizer, need_response=True, **fields)
    assert [(len(s.prompt_ids), len(s.response_ids)) for s in off_policy] == [(6, 2), (2, 6)]
    assert off_policy.dropped == 3
    assert "dropped 1 whose prompt and 2 whose response does not fit into seq_length 8" in caplog.text


GOOD = {"prompt": "one", "response": "two"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": ', "line 2: not JSON"),
        ("", "line 2: not JSON"),
        ("[1]", "line 2: holds a list"),
        ({"question": "one"}, r"line 2: no column 'prompt' among \['question'\]"),
        ({"prompt": 5, "response": "two"}, "line 2: prompt = 5: must be text"),
        ({"prompt": None, "response": "two"}, "line 2: prompt = None"),
        ({"prompt": "one", "response": " "}, "line 2: response = ' '"),
        ({"prompt": "one"}, "line 2: no column 'response'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, bad, message):
    write(tmp_path / "bad.jsonl", GOOD, bad, GOOD)
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        load(tmp_path / "bad.jsonl", tokenizer, need_response=True)


def test_a_bad_parquet_row_is_named(tmp_path, tokenizer):
    pd.DataFrame({"prompt": ["one", None]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet, row 2: prompt = None"):
        load(tmp_path / "bad.parquet", tokenizer)


def test_a_response_is_not_asked_for_on_policy(tmp_path, tokenizer):
    assert len(load(write(tmp_path / "a.jsonl", {"prompt": "one"}), tokenizer)) == 1


def test_unusable_sources(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.csv").write_text("prompt\none\n")
    (tmp_path / "folder").mkdir()
    pd.DataFrame({"prompt": []}).to_parquet(tmp_path / "empty.parquet")
    for name, message in {
        "empty.jsonl": "is empty or",
        "empty.parquet": "is empty or",
        "missing.jsonl": "there is no such file",
        "latin.jsonl": ".* cannot be read as .jsonl .*utf-8",
        "broken.parquet": ".* cannot be read as .parquet",
        "a.csv": "a file must end in .jsonl or .parquet",
        "folder": "the folder holds no",
    }.items():
        with pytest.raises(ValueError, match=rf"data.path = '.*{name}': {message}"):
            load(tmp_path / name, tokenizer)
    with pytest.raises(ValueError, match=r"data.path = 'nobody/nothing' \(subset None, split train\): neither a local"):
        load("nobody/nothing", tokenizer)
    write(tmp_path / "long.jsonl", {"prompt": "one two three"})
    with pytest.raises(ValueError, match=r"no usable row \(1 dropped for data.seq_length = 3\)"):
        load(tmp_path / "long.jsonl", tokenizer, seq_length=3)


def test_tokenizer_without_template(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"apply_chat_template = True.*no chat template"):
        load(path, make_tokenizer(chat_template=None))


def test_the_vocabulary_of_a_saved_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    check_same_tokenizer(loaded, tokenizer)
    assert Vocabulary.of(loaded, tmp_path) == Vocabulary(len(WORDS), EOS, (EOS,))
    GenerationConfig(eos_token_id=[2, EOS]).save_pretrained(tmp_path)
    assert Vocabulary.of(loaded, tmp_path).eos_ids == (EOS, 2)
    with pytest.raises(ValueError, match="no EOS token"):
        Vocabulary.of(make_tokenizer(eos_token=None), tmp_path)


def test_a_model_has_a_row_for_every_token_id():
    vocabulary = Vocabulary(10, 0, (1,))
    vocabulary.require_rows(student=10, teacher=12)
    with pytest.raises(ValueError, match=r"teacher.path: the tokenizer has 10 ids, but the model 9 rows"):
        vocabulary.require_rows(student=10, teacher=9)


def test_a_response_ends_with_its_first_eos(tmp_path, tokenizer):
    """Also one whose text or tokens go on: nothing behind it is trained."""
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "one", "response": "two <eos>"},
        {"prompt": "one", "response": "two <eos> three"},
        {"prompt": "one", "response": "two", "response_ids": [TWO, EOS, EOS, 0]},
        {"prompt": "one", "response": "two", "response_ids": [TWO]},
    )
    data = load(path, tokenizer, need_response=True)
    assert [sample.response_ids for sample in data] == [[TWO, EOS]] * 3 + [[TWO]]


@pytest.mark.parametrize("inside", ["context/huggingface", "context/nemo_tokenizer"])
def test_nemo_folder_and_folders_without_tokenizer(tmp_path, tokenizer, inside):
    tokenizer.save_pretrained(tmp_path / "nemo" / inside)
    assert load_tokenizer(tmp_path / "nemo").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="missing: no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no tokenizer that"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("teacher", "difference"),
    [
        (make_tokenizer([*WORDS[:6], "two", "one", *WORDS[8:]]), "the id of token 'one' is 7 instead of 6"),
        (make_tokenizer([*WORDS, "five"]), "the id of token 'five' is 10 instead of None"),
        (make_tokenizer(eos_token="<end>"), "eos_token_id is 2 instead of 1"),
        (make_tokenizer(chat_template="{{ messages }}"), "chat_template is"),
    ],
)
def test_the_first_tokenizer_difference_is_named(tokenizer, teacher, difference):
    with pytest.raises(ValueError, match=f"tokenizer is not the student's: {difference}"):
        check_same_tokenizer(tokenizer, teacher)


def numbered(n):
    return [Sample(i, [i], []) for i in range(n)]


def test_each_epoch_is_its_own_permutation():
    draws = list(EpochOrder(numbered(7), 21, seed=3))
    assert [s.index for s in draws] == list(range(21))
    epochs = [[s.prompt_ids[0] for s in draws[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_seed_and_position_alone():
    order = EpochOrder(numbered(5), 40, seed=3)
    draws = [order[i] for i in range(40)]
    resumed = EpochOrder(numbered(5), 40, seed=3)
    assert [resumed[i] for i in reversed(range(40))] == draws[::-1]
    assert [EpochOrder(numbered(5), 40, seed=4)[i] for i in range(40)] != draws
    with pytest.raises(IndexError):
        order[40]


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=12, max_size=12)
budgets = st.sampled_from([0, 18, 40])  # tokens of a micro-batch; 0: cut by rows


def micro_batches(rows, micro_batch_size=1, multiple=1, data_parallel_size=1, tokens=0):
    """The micro-batches of each data-parallel rank."""
    batch = GlobalBatch.of(*zip(*rows, strict=True))
    split = batch.student_split(data_parallel_size, micro_batch_size, multiple, micro_batch_tokens=tokens)
    return [batch.micro_batches(split, rank, pad_id=0, device="cpu") for rank in range(data_parallel_size)]


def require_padded(batch, rows, multiple):
    """The rows of a micro-batch are those of its samples, padded on the right no further than needed."""
    width = batch["tokens"].shape[1]
    lengths = [len(rows[i][0].prompt_ids) + len(rows[i][1]) for i in batch["sample_index"].tolist()]
    assert width % multiple == 0
    assert width - max(lengths) < multiple
    for b, (i, end) in enumerate(zip(batch["sample_index"].tolist(), lengths, strict=True)):
        sample, response = rows[i]
        assert batch["tokens"][b, :end].tolist() == sample.prompt_ids + response
        assert not batch["tokens"][b, end:].any()
        assert batch["position_ids"][b].tolist() == list(range(width))
        predicted = batch["tokens"][b].roll(-1)[batch["response_mask"][b]]
        assert predicted.tolist() == response
        assert batch["labels"][b, :-1].tolist() == batch["tokens"][b, 1:].tolist()
        assert batch["labels"][b][batch["response_mask"][b]].tolist() == response


@settings(deadline=None)
@given(
    lengths, st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 8]), st.sampled_from([0, 18, 40]), st.randoms()
)
def test_micro_batches_hold_every_sequence_once(lengths, micro_batch_size, multiple, tokens, random):
    rows = [(Sample(i, [10 + i] * n, []), [50 + i] * m) for i, (n, m) in enumerate(lengths)]
    batches = micro_batches(rows, micro_batch_size, multiple, tokens=tokens)[0]
    again = micro_batches(random.sample(rows, len(rows)), micro_batch_size, multiple, tokens=tokens)[0]
    for batch, other in zip(batches, again, strict=True):
        assert all(torch.equal(batch[key], other[key]) for key in batch)
    assert sorted(i for batch in batches for i in batch["sample_index"].tolist()) == list(range(12))
    for batch in batches:
        require_padded(batch, rows, multiple)
        if tokens:
            assert batch["tokens"].numel() <= tokens or len(batch["tokens"]) == 1
        else:
            assert len(batch["tokens"]) == micro_batch_size


def fewest(widths, tokens):
    """The least number of groups, each of at most `tokens` = rows x widest row: all ways to group, tried out."""

    def ways(rest):
        if not rest:
            yield []
            return
        for groups in ways(rest[1:]):
            yield [[rest[0]], *groups]
            for i, group in enumerate(groups):
                yield [*groups[:i], [rest[0], *group], *groups[i + 1 :]]

    allowed = (groups for groups in ways(widths) if all(len(g) == 1 or len(g) * max(g) <= tokens for g in groups))
    return min(map(len, allowed))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=12, max_size=12), st.integers(1, 30), st.sampled_from([1, 4]))
def test_a_token_budget_gives_all_ranks_as_few_micro_batches_as_the_fullest_needs(lengths, tokens, multiple):
    rows = [(Sample(i, [7] * n, []), []) for i, n in enumerate(lengths)]
    ranks = micro_batches(rows, multiple=multiple, data_parallel_size=2, tokens=tokens)
    padded = [-(-n // multiple) * multiple for n in lengths]
    counts = {len(batches) for batches in ranks}
    assert counts == {max(fewest(padded[:6], tokens), fewest(padded[6:], tokens))}
    for rank, batches in enumerate(ranks):
        assert sorted(i for b in batches for i in b["sample_index"].tolist()) == list(range(6 * rank, 6 * rank + 6))
        widths = [b["tokens"].shape[1] for b in batches]
        assert widths == sorted(widths, reverse=True)
        assert all(b["tokens"].numel() <= tokens or len(b["tokens"]) == 1 for b in batches)


def test_a_rank_that_needs_fewer_micro_batches_halves_its_largest():
    prompts = [[7] * n for n in (10, 10, 10, 10, 2, 2, 2, 1)]
    rows = [(Sample(i, prompt, []), []) for i, prompt in enumerate(prompts)]
    one, other = micro_batches(rows, data_parallel_size=2, tokens=10)
    assert [b["sample_index"].tolist() for b in one] == [[0], [1], [2], [3]]
    assert [b["sample_index"].tolist() for b in other] == [[4], [5], [6], [7]]  # one of 4 x 2 tokens would fit
    one, other = micro_batches(rows, data_parallel_size=2, tokens=20)
    assert [b["sample_index"].tolist() for b in other] == [[4, 5], [6, 7]]


def test_sorting_by_length_wastes_little_padding():
    rows = [(Sample(i, [1] * (1 + 37 * i % 64), []), []) for i in range(64)]
    batches = micro_batches(rows, 4)[0]
    padding = sum(batch["tokens"].numel() for batch in batches) - sum(len(row.prompt_ids) for row, _ in rows)
    assert padding <= 3 * 2 * len(batches)  # lengths 1..64: rows of a micro-batch differ by 3, 2, 1 and 0 tokens
    assert [batch["tokens"].shape[1] for batch in batches] == list(range(64, 0, -4))

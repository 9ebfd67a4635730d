"""Bad input of every kind: the command says in a line what is wrong, exits with its status, and starts nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_hf
from safetensors.numpy import load_file, save_file

import nemo_tsdkd.cli.main
from nemo_tsdkd.checkpoints.manifest import add_manifest
from nemo_tsdkd.config.validation import HostError
from nemo_tsdkd.distributed import output

GOOD = {"prompt": "Ann has 3 boxes", "response": "36"}


@dataclass
class Place:
    """Two models, data, and what else goes onto the command line."""

    root: Path
    student: Path
    teacher: Path
    data: Path
    extra: list[str]
    config: list[str]

    def arguments(self) -> list[str]:
        fields = {"run_dir": self.root / "run", "student.path": self.student, "teacher.path": self.teacher}
        given = [f"{name}={value}" for name, value in fields.items()] + [f"data.path={self.data}"]
        return [*(self.config or ["--config-name", "tiny"]), *given, *self.extra]

    def rows(self, *rows: object) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.data.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Hugging Face folder, and as much of a NeMo checkpoint of it as is read without its stack."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    hf = tiny_hf.save_hf(root / "hf", num_attention_heads=2, num_key_value_heads=2, **sizes)
    assets = root / "nemo" / "context" / "huggingface"
    shutil.copytree(hf, assets, ignore=shutil.ignore_patterns("*.safetensors"))
    (root / "nemo" / "weights").mkdir()
    formats = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    (root / "nemo" / "weights" / "metadata.json").write_text(json.dumps(formats))
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        (root / "nemo" / "weights" / name).write_bytes(name.encode() * 100)
    add_manifest(root / "nemo")
    return root


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    shutil.copytree(models / "hf", tmp_path / "student")
    place = Place(tmp_path, tmp_path / "student", models / "hf", tmp_path / "data.jsonl", [], [])
    place.rows(GOOD, GOOD)
    return place


@pytest.fixture
def started(monkeypatch):
    """The configurations that training was started with; the stack stays out of the way."""
    configs: list = []
    stand_in = types.SimpleNamespace(train=configs.append)
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron", types.SimpleNamespace(train=stand_in))
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron.train", stand_in)
    return configs


def run(capfd, command: str, *arguments: str) -> tuple[int, str]:
    status = 0
    try:
        nemo_tsdkd.cli.main.main([command, *arguments])
    except SystemExit as end:
        status = end.code
    return status, capfd.readouterr().err


Spoil = Callable[[Place], None]
CASES: dict[str, tuple[Spoil, str]] = {}
SETTINGS = ("setting: ", "configuration: ")


def case(name: str, message: str) -> Callable[[Spoil], Spoil]:
    """Register what spoils a place, with what the user must be told."""

    def register(spoil: Spoil) -> Spoil:
        assert name not in CASES
        CASES[name] = spoil, message
        return spoil

    return register


def setting(message: str, *overrides: str) -> None:
    case(f"setting: {' '.join(overrides)[:40]}", message)(lambda place: place.extra.extend(overrides))


for field in (
    *("optim.lr", "optim.weight_decay", "optim.clip_grad", "objective.temperature", "objective.gate_temperature"),
    *("objective.beta", "objective.direct_weight", "rollout.temperature", "rollout.top_p", "checkpoint.every_minutes"),
):
    for value in ("inf", "nan"):
        setting(rf"{field} = {value}: must be a finite number", f"{field}={value}")
setting(r"seed", "seed=1e20")
setting(r"seed = 100000000000000000000: must be less than 2\^31", "seed=100000000000000000000")
setting(r"seed = -1: must not be negative", "seed=-1")
setting(r"max_steps", "max_steps=1e400")
setting(r"run_dir = '': must be a path", "run_dir=''")
setting(r"run_dir = '': must be a path", "run_dir=")
setting(r"run_dir", "run_dir=null")
setting(r"run_dir = '/proc/run': /proc cannot be written to", "run_dir=/proc/run")
setting(r"run_dir = '/xxx.*: cannot be a folder's name", f"run_dir=/{'x' * 300}")
setting(r"run_dir.*: not text", "run_dir='/tmp/\udcff'")
setting(r"student.path = '': must be a path", "student.path=")
setting(r"Key 'lrr' not in 'OptimConfig'", "optim.lrr=1")
setting(r"max_steps", "max_steps=three")
setting(r"'max_steps'", "max_steps")
setting(r"'max_steps=\[1': cannot be read as key=value", "max_steps=[1")
setting(r"must not exceed the student's max_position_embeddings = 128", "data.seq_length=4096")
setting(r"data.limit = 0: must be greater than 0", "data.limit=0")
setting(r"num_hidden_layers = 2", "parallel.pipeline_model_parallel_size=3", "parallel.gpus_per_node=3")
setting(r"2: but 1 ranks were started", "parallel.gpus_per_node=2")


@case("run_dir is a file", "/run is not a folder")
def _(place: Place) -> None:
    (place.root / "run").touch()


@case("run_dir lies below a file", "data.jsonl is not a folder")
def _(place: Place) -> None:
    place.extra.append(f"run_dir={place.data}/run")


def configuration(name: str, content: str | bytes, message: str) -> None:
    def spoil(place: Place) -> None:
        (place.root / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        place.config = ["--config-name", "mine", "--config-dir", str(place.root)]

    case(name, message)(spoil)


configuration("configuration: bytes", b"\xff\xfe\x00\x01", "configuration 'mine'")
configuration("configuration: a list", "- 1\n- 2\n", "configuration 'mine'")
configuration("configuration: a word", "hello\n", "configuration 'mine'")
configuration("configuration: not closed", "defaults: [train\n", "configuration 'mine'")
configuration("configuration: deep", "a: " + "[" * 2000, "configuration 'mine'")
configuration("configuration: a tag", "a: !!python/object/apply:os.system ['true']\n", "configuration 'mine'")
configuration("configuration: a cycle", "defaults: [train]\nseed: ${max_steps}\nmax_steps: ${seed}\n", "'mine'")
configuration("configuration: empty", "", "leaves open|run_dir|configuration 'mine'")
case("no such configuration", "'nope'")(lambda place: place.config.extend(["--config-name", "nope"]))
case("no such folder", "no such folder")(lambda p: p.config.extend(["--config-name", "a", "--config-dir", "/nowhere"]))


def weights(place: Place) -> Path:
    return place.student / "model.safetensors"


@case("weights cut short", "model.safetensors: not a complete safetensors file")
def _(place: Place) -> None:
    weights(place).write_bytes(weights(place).read_bytes()[:-1])


@case("weights empty", "model.safetensors: not a complete safetensors file")
def _(place: Place) -> None:
    weights(place).write_bytes(b"")


@case("weights garbage", "model.safetensors: not a complete safetensors file")
def _(place: Place) -> None:
    weights(place).write_bytes(b"garbage" * 100)


@case("weights are a pickle", r"weights are a pickle \(.bin\)")
def _(place: Place) -> None:
    weights(place).rename(place.student / "pytorch_model.bin")


@case("weights quantized", "is I8: must be one of F32")
def _(place: Place) -> None:
    tensors = load_file(weights(place))
    save_file(tensors | {"model.norm.weight": np.ones(16, np.int8)}, weights(place))


@case("weights in another folder", "is named in model.safetensors.index.json, but not in the folder")
def _(place: Place) -> None:
    shard(place, "../../model.safetensors")


@case("weights by an absolute path", "is named in model.safetensors.index.json, but not in the folder")
def _(place: Place) -> None:
    shard(place, str(place.teacher / "model.safetensors"))


@case("a shard is missing", "model-00002-of-00002.safetensors: is named in")
def _(place: Place) -> None:
    shard(place, "model-00001-of-00002.safetensors", rename=True)
    index = place.student / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"] | {"lm_head.weight": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))


@case("weights behind a link", "model.safetensors: is a link to .*, outside of the model's folder")
def _(place: Place) -> None:
    weights(place).unlink()
    weights(place).symlink_to(place.teacher / "model.safetensors")


def shard(place: Place, name: str, rename: bool = False) -> None:
    names = dict.fromkeys(load_file(weights(place)), name)
    (place.student / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    shutil.copy(weights(place), place.student / "model-00001-of-00002.safetensors")
    weights(place).unlink()


def json_field(name: str, file: str, change: dict, message: str) -> None:
    def spoil(place: Place) -> None:
        path = place.student / file
        stated = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: value for key, value in stated.items() if value is not ...}))

    change = dict(change)
    case(name, message)(spoil)


def content(name: str, file: str, text: str, message: str) -> None:
    case(name, message)(lambda place: (place.student / file).write_text(text) and None)


json_field(
    "quantized", "config.json", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"
)
json_field("the model's own code", "config.json", {"auto_map": {"AutoModel": "m.M"}}, "auto_map asks to run")
json_field("another architecture", "config.json", {"model_type": "mamba"}, "model_type = 'mamba': must be one of")
json_field("a dimension of text", "config.json", {"hidden_size": "16"}, "hidden_size = '16': must be a whole")
json_field("a dimension of 0", "config.json", {"num_attention_heads": 0}, "num_attention_heads = 0: must be")
json_field("an EOS that is none", "generation_config.json", {"eos_token_id": 9999}, "eos_token_id = 9999")
json_field("an EOS of text", "generation_config.json", {"eos_token_id": "end"}, "eos_token_id = 'end'")
json_field(
    "fewer rows than tokens", "config.json", {"vocab_size": 100}, "the tokenizer has [0-9]+ ids, but the model 100 rows"
)
content("config.json garbage", "config.json", "{{{", "config.json: not readable as JSON")
content("config.json a list", "config.json", "[1]", "config.json: holds list")
content("config.json deep", "config.json", "[" * 100_000, "config.json: not readable as JSON")
content("generation_config.json garbage", "generation_config.json", "{", "generation_config.json: not readable")
content("tokenizer garbage", "tokenizer.json", "{", "no tokenizer that transformers can load")
content("tokenizer of another kind", "tokenizer.json", '{"model": 1}', "no tokenizer that transformers can load")
content("an adapter", "adapter_config.json", "{}", "holds an adapter, not a model")
content("ModelOpt's state", "modelopt_state.pth", "x", "ModelOpt's state is a pickle")
content(
    "another template", "chat_template.jinja", "{{ messages }}", "its tokenizer is not the student's: chat_template"
)


@case("config.json without a dimension", "num_hidden_layers = None: must be a whole number")
def _(place: Place) -> None:
    stated = json.loads((place.student / "config.json").read_text())
    del stated["num_hidden_layers"]
    (place.student / "config.json").write_text(json.dumps(stated))


@case("no tokenizer", "no tokenizer that transformers can load")
def _(place: Place) -> None:
    for path in place.student.glob("*tokenizer*"):
        path.unlink()


@case("the tokenizer's own code", "no tokenizer that transformers can load")
def _(place: Place) -> None:
    (place.student / "tokenizer.py").write_text(f"open({str(place.root / 'ran')!r}, 'w')\nclass T: pass\n")
    mine = {"auto_map": {"AutoTokenizer": ["tokenizer.T", None]}, "tokenizer_class": "T"}
    (place.student / "tokenizer_config.json").write_text(json.dumps(mine))


@case("no model", "no such folder")
def _(place: Place) -> None:
    place.student = place.root / "nowhere"


@case("a file for a model", "no such folder|not a")
def _(place: Place) -> None:
    place.student = place.data


def nemo(name: str, message: str) -> Callable[[Spoil], Spoil]:
    """A case whose student is a copy of the NeMo checkpoint."""

    def register(spoil: Spoil) -> Spoil:
        def both(place: Place) -> None:
            place.student = place.root / "nemo"
            shutil.copytree(place.teacher.parent / "nemo", place.student)
            spoil(place)

        return case(name, message)(both)

    return register


@nemo("an import cut short", "__0_0.distcp has 1199 bytes instead of 1200")
def _(place: Place) -> None:
    path = place.student / "weights" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


@nemo("an import without a file", "weights/common.pt is missing")
def _(place: Place) -> None:
    (place.student / "weights" / "common.pt").unlink()


@nemo("an empty manifest", "its manifest lists no file")
def _(place: Place) -> None:
    (place.student / "manifest.json").write_text("{}")


@nemo("a manifest of garbage", "its manifest cannot be read")
def _(place: Place) -> None:
    (place.student / "manifest.json").write_text("{{")


@nemo("a foreign checkpoint without metadata", ".metadata, common.pt or .distcp files are missing or empty")
def _(place: Place) -> None:
    (place.student / "manifest.json").unlink()
    (place.student / "weights" / ".metadata").unlink()


@nemo("another format", "sharded_backend = 'zarr': must be 'torch_dist'")
def _(place: Place) -> None:
    (place.student / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')


@nemo("a link in a checkpoint", "is a link to .*, outside of the model's folder")
def _(place: Place) -> None:
    path = place.student / "weights" / "__0_0.distcp"
    path.unlink()
    path.symlink_to(place.data)


def row(name: str, line: object, message: str, *extra: str) -> None:
    def spoil(place: Place) -> None:
        place.rows(GOOD, line)
        place.extra.extend(extra)

    case(name, f"data.jsonl, line 2: {message}")(spoil)


OFF_POLICY = "rollout.lmbda=0"
row("half of a surrogate pair", r'{"prompt": "a\ud800"}', r"prompt holds '\\ud800' at character 1")
row("deep JSON", '{"prompt": ' + "[" * 100_000, "not JSON")
row("a number of 5,000 digits", '{"prompt": ' + "1" * 5000 + "}", "not JSON")
row("not JSON", "{'prompt': 1}", "not JSON")
row("a list", "[1]", "holds a list")
row("a prompt that is a number", {"prompt": 3}, "prompt = 3: must be text")
row("no prompt", {"text": "a"}, "no column 'prompt'")
row("no response", {"prompt": "a"}, "no column 'response'", OFF_POLICY)
row("ids of text", GOOD | {"response_ids": ["1"]}, r"response_ids = \['1'\]: must be a list of token ids", OFF_POLICY)
row("ids below 0", GOOD | {"response_ids": [-1]}, r"response_ids = \[-1\]: must be a list of token ids", OFF_POLICY)
row("ids too large", GOOD | {"response_ids": [10**9]}, r"response_ids = \[1000000000\]: must be", OFF_POLICY)
row("ids that are true", GOOD | {"response_ids": [True]}, r"response_ids = \[True\]: must be", OFF_POLICY)
row("ids of one number", GOOD | {"response_ids": 3}, "response_ids = 3: must be a list", OFF_POLICY)
row("ids of other text", GOOD | {"response_ids": [70, 71]}, "response_ids are not the tokens of", OFF_POLICY)


def template(name: str, text: str, message: str) -> None:
    def spoil(place: Place) -> None:
        place.teacher = place.student
        (place.student / "chat_template.jinja").write_text(text)

    case(name, f"data.jsonl, line 1: .*{message}")(spoil)


template("a template that raises", "{{ raise_exception('no system') }}", "no system")
template("a template that divides by 0", "{{ 1 / 0 }}", "chat template fails")
template("a template that is none", "{% if %}", "chat template fails")
template("a template that says nothing", "{# nothing #}", "gives no token")


@case("no template", "the tokenizer has no chat template")
def _(place: Place) -> None:
    place.teacher = place.student
    (place.student / "chat_template.jinja").unlink()


def data(name: str, file: str, content: bytes, message: str) -> None:
    def spoil(place: Place) -> None:
        place.data = place.root / file
        place.data.write_bytes(content)

    case(name, message)(spoil)


data("data empty", "empty.jsonl", b"", "empty.jsonl': is empty")
data("data not UTF-8", "latin.jsonl", b'{"prompt": "\xe9"}\n', "cannot be read as .jsonl")
data("data a broken Parquet", "broken.parquet", b"PAR1", "cannot be read as .parquet")
data("data of another kind", "data.csv", b"prompt\na\n", "must end in .jsonl or .parquet")
case("no data", "there is no such file")(lambda place: place.data.unlink())


@case("a folder without data", "the folder holds no .jsonl or .parquet file")
def _(place: Place) -> None:
    place.data = place.root / "folder"
    place.data.mkdir()


HELD_OUT = "validation.path=held_out.jsonl"
setting(r"validation.path = '': must be a path", "validation.path=")
setting(r"validation.path = 'held_out.jsonl': there is no such file", HELD_OUT)
setting(r"checkpoint.keep_best = True: needs validation.path", "checkpoint.keep_best=true")
setting(r"validation.patience = 2: needs validation.path", "validation.patience=2")
for field in ("every_n_steps", "limit", "max_new_tokens"):
    setting(rf"validation.{field} = 0: must be greater than 0", f"validation.{field}=0")
setting(r"validation.temperature = -1.0: must not be negative", "validation.temperature=-1")
setting(r"samples.count = -1: must not be negative", "samples.count=-1")
setting(
    r"validation.max_new_tokens = 99: must be fewer than data.seq_length = 64", "validation.max_new_tokens=99", HELD_OUT
)
setting(
    r"validation.every_n_steps = 3: must be a multiple of rollout.reuse = 2",
    *("rollout.reuse=2", "max_steps=4", "validation.every_n_steps=3", "validation.patience=1", HELD_OUT),
)
setting(
    r"validation.verifier = 'vote': must be one of exact, math, reasoning_gym", "validation.verifier=vote", HELD_OUT
)


def held_out(name: str, content: str, message: str, *overrides: str) -> None:
    """A row of the held-out prompts after a good one."""

    @case(f"held out {name}", message)
    def _(place: Place) -> None:
        file = place.root / "held_out.jsonl"
        file.write_text('{"prompt": "1 + 1", "answer": 2}\n' + content + "\n")
        place.extra.extend([f"validation.path={file}", *overrides])


held_out("no prompt", '{"answer": "1"}', r"held_out.jsonl, line 2: no column 'prompt'.*Set validation.prompt_column")
held_out("no answer", '{"prompt": "1"}', r"held_out.jsonl, line 2: no column 'answer'.*Set validation.answer_column")
held_out("an answer that is none", '{"prompt": "1", "answer": []}', r"line 2: answer = \[\]: must be text or a number")
held_out(
    "no entry",
    '{"prompt": "1", "answer": "1"}',
    r"line 1: answer = 2: must be reasoning-gym's entry",
    "validation.verifier=reasoning_gym",
)
held_out("no JSON", "{", r"held_out.jsonl, line 2: not JSON")
held_out(
    "a split", '{"prompt": "1", "answer": 1}', r"validation.split = 'dev': only a hub data set", "validation.split=dev"
)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_one_line_and_starts_nothing(name, place, started, capfd):
    assert len(CASES) >= 80
    spoil, message = CASES[name]
    spoil(place)
    before = sorted(place.root.rglob("*"))
    status, err = run(capfd, "train", *place.arguments())
    assert status == 2 and started == [] and sorted(place.root.rglob("*")) == before
    assert err.startswith("nemo-tsdkd: error: ") and err.count("\n") <= 3
    assert re.search(message, err), err
    if not name.startswith(SETTINGS):  # which both commands read by the same call
        assert run(capfd, "check", *place.arguments()) == (2, err)


def test_good_input_starts(place, started, capfd):
    """Beside each bad one: the place that they spoil is good, in every letter."""
    place.root = place.root / "größe, 大 'of a run'"
    shutil.copytree(place.student, place.root / "Schüler")
    place.student = place.root / "Schüler"
    assert run(capfd, "check", *place.arguments()) == (0, "")
    assert run(capfd, "train", *place.arguments()) == (0, "")
    assert [config.student.path for config in started] == [str(place.student)]


def test_a_flipped_bit_is_found_by_reading(place, capfd):
    place.student = place.root / "nemo"
    shutil.copytree(place.teacher.parent / "nemo", place.student)
    assert run(capfd, "check", *place.arguments(), "--deep") == (0, "")
    weights = place.student / "weights" / "__0_0.distcp"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    assert run(capfd, "check", *place.arguments()) == (0, "")  # which compares sizes
    status, err = run(capfd, "check", *place.arguments(), "--deep")
    assert status == 2 and "the content of weights/__0_0.distcp has changed" in err


def test_what_could_not_be_checked_is_listed(place, capfd):
    place.student = place.root / "nemo"
    shutil.copytree(place.teacher.parent / "nemo", place.student)
    (place.student / "manifest.json").unlink()
    nemo_tsdkd.cli.main.main(["check", *place.arguments()])
    assert f"# not checked: the content of {place.student}, which has no manifest\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/run"),
        OSError(errno.ESTALE, "Stale file handle"),
        HostError("MASTER_PORT = 5: taken"),
    ],
)
def test_what_the_machine_refuses_has_another_status(error, place, monkeypatch, capfd):
    def train(config):
        os.write(1, b"from a library")
        raise error

    stand_in = types.SimpleNamespace(train=train)
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron", types.SimpleNamespace(train=stand_in))
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron.train", stand_in)
    status, err = run(capfd, "train", *place.arguments())
    log = place.root / "run" / "logs" / "rank_0.log"
    assert (status, err) == (1, f"nemo-tsdkd: error: {error} More in {log}.\n")
    assert "Traceback" in log.read_text() and "from a library" in log.read_text()


@pytest.mark.parametrize("behind", [False, True])
def test_verbose_leaves_what_libraries_print_on_the_console(place, monkeypatch, capfd, behind):
    stand_in = types.SimpleNamespace(train=lambda config: os.write(1, b"from a library\n") and None)
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron", types.SimpleNamespace(train=stand_in))
    monkeypatch.setitem(sys.modules, "nemo_tsdkd.megatron.train", stand_in)
    monkeypatch.setattr(output, "_to_console", False)  # so that monkeypatch takes back what --verbose sets
    nemo_tsdkd.cli.main.main(
        ["train", "--verbose", *place.arguments()] if behind else ["--verbose", "train", *place.arguments()]
    )
    assert "from a library" in capfd.readouterr().out
    assert not (place.root / "run" / "logs").exists()

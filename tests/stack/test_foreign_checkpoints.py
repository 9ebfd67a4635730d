"""Checkpoints crafted to run code, or to be read from elsewhere: each is refused by name, and nothing happens."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import ranks
import tiny_run
import torch
from torch.distributed.checkpoint.metadata import Metadata

ENTRY = "module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"


class Payload:
    """A pickle of it makes a folder where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.makedirs, (str(self.marker),)


def torch_file(content: object, **how: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def metadata(checkpoint: Path) -> Metadata:
    return pickle.loads((checkpoint / "weights" / ".metadata").read_bytes())


def write_metadata(checkpoint: Path, content: object) -> None:
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(content))


def is_a_pickle(checkpoint: Path, marker: Path) -> None:
    write_metadata(checkpoint, Payload(marker))


def holds_a_pickle(checkpoint: Path, marker: Path) -> None:
    found = metadata(checkpoint)
    found.planner_data = {"a": [Payload(marker)]}
    write_metadata(checkpoint, found)


def walks_from_an_admitted_module(checkpoint: Path, marker: Path) -> None:
    """`torch.serialization.os.makedirs`, as protocol 4 can say it: an admitted module, a dotted name."""
    name, path = b"os.makedirs", str(marker).encode()
    call = b"\x8c\x13torch.serialization\x8c" + bytes([len(name)]) + name + b"\x93"
    (checkpoint / "weights" / ".metadata").write_bytes(
        b"\x80\x04" + call + b"X" + len(path).to_bytes(4, "little") + path + b"\x85R."
    )


def points_out_of_its_folder(checkpoint: Path, marker: Path) -> None:
    found = metadata(checkpoint)
    for info in found.storage_data.values():
        info.relative_path = f"../../elsewhere/{info.relative_path}"
    shutil.copytree(checkpoint / "weights", checkpoint.parent / "elsewhere")
    write_metadata(checkpoint, found)


def set_entry(checkpoint: Path, content: bytes) -> None:
    """Replace one byte entry: its new content goes to the end of the file that held it."""
    found = metadata(checkpoint)
    info = next(info for index, info in found.storage_data.items() if index.fqn == ENTRY)
    file = checkpoint / "weights" / info.relative_path
    info.offset, info.length = file.stat().st_size, len(content)
    file.write_bytes(file.read_bytes() + content)
    write_metadata(checkpoint, found)


def entry_is_a_pickle(checkpoint: Path, marker: Path) -> None:
    set_entry(checkpoint, torch_file([Payload(marker)]))


def entry_is_an_old_pickle(checkpoint: Path, marker: Path) -> None:
    set_entry(checkpoint, torch_file([Payload(marker)], _use_new_zipfile_serialization=False))


def entry_is_a_pickle_in_a_tensor(checkpoint: Path, marker: Path) -> None:
    """As Transformer Engine writes it, and unpickles it in `set_extra_state`."""
    content = torch.frombuffer(bytearray(pickle.dumps(Payload(marker))), dtype=torch.uint8)
    set_entry(checkpoint, torch_file([content]))


def entry_is_a_pickle_in_a_file(checkpoint: Path, marker: Path) -> None:
    """As Transformer Engine 1 wrote it."""
    set_entry(checkpoint, torch_file([io.BytesIO(torch_file(Payload(marker)))]))


def common_is_a_pickle(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "weights" / "common.pt").write_bytes(torch_file({"a": Payload(marker)}))


def has_model_optimizer_state(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "weights" / "modelopt_state").mkdir()
    (checkpoint / "weights" / "modelopt_state" / "common.pt").write_bytes(torch_file(Payload(marker)))


def is_of_another_format(checkpoint: Path, marker: Path) -> None:
    path = checkpoint / "weights" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sharded_backend": "zarr"}))


def not_ours(checkpoint: Path, config: Callable[[dict, dict], None]) -> None:
    """Make it one of NeMo's own, without the source's config.json; `config` changes (model config, all objects)."""
    (checkpoint / "context" / "huggingface").rename(checkpoint / "context" / "nemo_tokenizer")
    path = checkpoint / "context" / "io.json"
    graph = json.loads(path.read_text())
    config(graph["objects"]["qwen2_config_1"], graph["objects"])
    path.write_text(json.dumps(graph))


def pyref(module: str, name: str) -> dict:
    return {"type": "pyref", "module": module, "name": name}


def calls(module: str, name: str) -> Callable[[Path, Path], None]:
    """A context whose config has, for one field, what a call of `module.name` returns."""

    def craft(checkpoint: Path, marker: Path) -> None:
        def change(config: dict, objects: dict) -> None:
            fiddle = "fiddle._src.config"
            nothing = {"type": pyref("builtins", "tuple"), "items": [], "metadata": None}
            empty = {"type": pyref("builtins", "dict"), "items": [], "metadata": nothing}
            names = {"type": pyref("builtins", "tuple"), "items": [["Index(index=0)", "name"]], "metadata": None}
            described = [
                ["Attr(name='fn_or_cls')", pyref(module, name)],
                ["Attr(name='argument_names')", names],
                ["Attr(name='argument_tags')", empty],
                ["Attr(name='argument_history')", empty],
            ]
            kind = pyref(fiddle, "BuildableTraverserMetadata")
            objects["called"] = {
                "type": pyref(fiddle, "Config"),
                "items": [["Attr(name='name')", str(marker)]],
                "metadata": {"type": kind, "items": described, "metadata": kind},
                "paths": ["<root>.model.config.num_layers"],
            }
            set_field(config, "num_layers", {"type": "ref", "key": "called"})

        not_ours(checkpoint, change)

    return craft


def set_field(config: dict, field: str, value: dict) -> None:
    config["items"] = [[name, value if f"'{field}'" in name else old] for name, old in config["items"]]


def context_holds_a_pickle(checkpoint: Path, marker: Path) -> None:
    """NeMo puts what JSON cannot say into a pickle beside it, and reads that with torch's functions admitted."""
    path = checkpoint / "context" / "artifacts" / "pickled"
    path.write_bytes(pickle.dumps(Payload(marker)))

    def change(config: dict, objects: dict) -> None:
        objects["pickled"] = {
            "type": pyref("nemo.collections.llm.gpt.model.qwen2", "Qwen2Config"),
            "items": [["IdentityElement()", "artifacts/pickled"]],
            "metadata": None,
            "paths": ["<root>.model.config.num_layers"],
        }
        set_field(config, "num_layers", {"type": "ref", "key": "pickled"})

    not_ours(checkpoint, change)


CRAFTED = {
    is_a_pickle: "names os.makedirs, which no checkpoint's metadata needs",
    holds_a_pickle: "names os.makedirs, which no checkpoint's metadata needs",
    walks_from_an_admitted_module: "names torch.serialization.os.makedirs",
    points_out_of_its_folder: "names the file '../../elsewhere/__0_",
    entry_is_a_pickle: f"entry '{ENTRY}' names os.makedirs, which could run code",
    entry_is_an_old_pickle: f"entry '{ENTRY}' names os.makedirs, which could run code",
    entry_is_a_pickle_in_a_tensor: None,  # read as the bytes it is, and kept from Transformer Engine
    entry_is_a_pickle_in_a_file: None,
    common_is_a_pickle: "common.pt names os.makedirs, which could run code",
    has_model_optimizer_state: "modelopt_state: ModelOpt's state is a pickle",
    is_of_another_format: "sharded_backend = 'zarr': must be 'torch_dist'",
    calls("os", "makedirs"): "io.json: names os.makedirs, which could run code",
    calls("nemo.collections.llm.gpt.model.base", "torch.os.makedirs"): r"names nemo\..*\.base\.torch\.os\.makedirs",
    context_holds_a_pickle: r"io.json: constructs nemo.*Qwen2Config, not a NeMo configuration",
}


def load_each(folders: list[Path]) -> list[tuple[str, str, int]]:
    """For each checkpoint what came of loading it as a model, what of NeMo's reader that a resumed run uses, and the
    bytes of extra state that a layer would have been given."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from nemo.lightning.io.pl import MegatronCheckpointIO

    from nemo_tsdkd.checkpoints.foreign import require_safe
    from nemo_tsdkd.config.validation import UserError
    from nemo_tsdkd.megatron.checkpoints import unpickling
    from nemo_tsdkd.megatron.checkpoints.load import frozen_model, gpt_config

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # as some shell profiles have it
    unpickling.install()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    results, module = [], None
    for folder in folders:
        said, resumed, extra = "loaded", "loaded", 0
        try:
            require_safe(folder)
            config = gpt_config(folder)
            config.vocab_size = 1024
            module = frozen_model(config, folder)
        except UserError as error:
            said = str(error)
        try:
            state = {"state_dict": module.sharded_state_dict(prefix="module.")}
            loaded = MegatronCheckpointIO().load_checkpoint(folder, state)["state_dict"]
            extra = sum(v.numel() for k, v in loaded.items() if "_extra_state" in k and v is not None)
        except BaseException as error:
            resumed = repr(error)
        results.append((said, resumed, extra))
    return results


def test_nothing_from_a_foreign_checkpoint_is_run(root, tmp_path):
    saved = tmp_path / "saved"  # by Megatron: with the byte entries that an import of ours has not
    ranks.run_ranks(tiny_run.export, 1, root / "student", "nemo", saved, meet=False)
    folders = [tmp_path / "whole"]
    shutil.copytree(saved, folders[0])
    for number, craft in enumerate(CRAFTED):
        folders.append(tmp_path / str(number) / "checkpoint")
        shutil.copytree(saved, folders[-1])
        craft(folders[-1], tmp_path / str(number) / "marker")
    foreign = tmp_path / "foreign"
    shutil.copytree(saved, foreign)
    not_ours(foreign, lambda config, objects: None)
    whole, *crafted, not_crafted = ranks.run_ranks(load_each, 1, [*folders, foreign])[0]
    assert whole == not_crafted == ("loaded", "loaded", 0)
    assert [path for path in tmp_path.glob("*/marker")] == []
    for (craft, expected), (said, resumed, extra) in zip(CRAFTED.items(), crafted, strict=True):
        assert extra == 0
        if expected is None:
            assert said == resumed == "loaded"
        else:
            assert re.search(expected, said) and "\n" not in said, (craft, said)

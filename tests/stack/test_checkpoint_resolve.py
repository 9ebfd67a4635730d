"""From a path to a NeMo checkpoint: what is imported, once, and what is refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import ranks
import tiny_hf

from nemo_tsdkd.checkpoints.manifest import add_manifest


def resolve(path: Path, cache_dir: Path) -> str:
    from nemo_tsdkd.megatron.checkpoints.load import resolve

    try:
        return str(resolve(path, cache_dir))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_a_hugging_face_folder_is_imported_once(tmp_path):
    hf, cache = tiny_hf.save_hf(tmp_path / "hf"), tmp_path / "cache"
    first, second = ranks.run_ranks(resolve, 2, hf, cache)
    assert first == second and list(cache.iterdir()) == [Path(first)]
    times = {p: p.stat().st_mtime_ns for p in Path(first).rglob("*")}
    assert resolve_here(hf, cache) == first and {p: p.stat().st_mtime_ns for p in Path(first).rglob("*")} == times
    assert resolve_here(Path(first), cache) == first


def resolve_here(path: Path, cache_dir: Path) -> str:
    return ranks.run_ranks(resolve, 1, path, cache_dir)[0]


def test_a_failed_import_reaches_every_rank(tmp_path):
    hf = tiny_hf.save_hf(tmp_path / "hf")
    with (hf / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    for message in ranks.run_ranks(resolve, 2, hf, tmp_path / "cache"):
        assert message.startswith("UserError") and "model.safetensors: not a complete safetensors file" in message
    assert not (tmp_path / "cache").exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resolve_each(folders: list[Path], cache_dir: Path) -> list[str]:
    return [resolve(folder, cache_dir) for folder in folders]


def test_one_flipped_bit_in_an_import_or_an_export_is_found_by_every_rank(root, tmp_path):
    whole, flipped, without_manifest = (shutil.copytree(root / "student", tmp_path / name) for name in "abc")
    largest = max((flipped / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip_a_bit(largest)
    (without_manifest / "manifest.json").unlink()
    exported = shutil.copytree(root / "hf_student", tmp_path / "exported")
    add_manifest(exported)
    flip_a_bit(exported / "model.safetensors")
    found = ranks.run_ranks(resolve_each, 2, [whole, flipped, without_manifest, exported], tmp_path / "cache")
    changed = f"UserError: {flipped}: the content of weights/{largest.name} has changed. Remove it and import the model"
    for said in found:
        assert said[0] == str(whole) and said[1].startswith(changed) and said[2] == str(without_manifest)
        assert said[3].startswith("UserError") and "exported: the content of model.safetensors has changed" in said[3]


def convert_on_a_small_disk(root: Path, disk: Path) -> list[str]:
    """What an import into a full disk says, and what it leaves."""
    from nemo_tsdkd.cli.main import main

    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=True)
    try:
        main(["import", "--source", str(root / "hf_student"), "--output", str(disk / "imported")])
    except SystemExit as end:
        return [str(end.code), *(path.name for path in disk.iterdir())]
    finally:
        subprocess.run(["umount", disk], check=True)
    return []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a file system")
def test_a_full_disk_under_an_import_is_the_machine_s_fault(root, tmp_path):
    said = ranks.run_ranks(convert_on_a_small_disk, 1, root, tmp_path / "disk", meet=False)[0]
    assert said == ["1", "imported.log"]


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def setting(**change):
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))

    return apply


REFUSED = {
    "pickle": (pickled, "pickle"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors"),
    "own code": (setting(auto_map={"AutoModel": "model.Model"}), "auto_map"),
    "other architecture": (setting(model_type="mamba"), "model_type = 'mamba'"),
    "sliding window": (setting(use_sliding_window=True), "use_sliding_window"),
    "yarn": (setting(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling"),
    "no folder": (shutil.rmtree, "no such folder"),
    "broken json": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_imported_is_refused_with_its_reason(kind, tmp_path):
    spoil, reason = REFUSED[kind]
    folder = tiny_hf.save_hf(tmp_path / "hf")
    spoil(folder)
    message = resolve_here(folder, tmp_path / "cache")
    assert message.startswith("UserError") and reason in message


def widths(cases: list) -> list[int]:
    from nemo_tsdkd.checkpoints.shape import padded_vocab_size

    return [padded_vocab_size(*sizes, tensor_model_parallel_size=tp) for sizes, tp in cases]


def test_the_common_width_holds_both_models_and_serves_every_layout():
    cases = {((151936, 152064), 1): 152576, ((151936, 152064), 8): 152576, ((330,), 2): 1024, ((330,), 3): 3072}
    assert ranks.run_ranks(widths, 1, list(cases))[0] == list(cases.values())

"""Tensors that are missing, surplus or misshapen are errors that name them, on import and on export."""

import json
from pathlib import Path

import pytest
import ranks
import tiny_hf
import tiny_run
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hugging Face folders, and the import of the first."""
    root = tmp_path_factory.mktemp("models")
    tiny_hf.save_hf(root / "qwen2", num_hidden_layers=2)
    tiny_hf.save_hf(root / "tied", num_hidden_layers=2, tied=True)
    tiny_hf.save_hf(root / "qwen3", "qwen3", num_hidden_layers=2, head_dim=32)
    ranks.run_ranks(tiny_run.import_hf, 1, root / "qwen2", root / "nemo", meet=False)
    return root


def lacks(suffix):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(suffix)}


def has(name, *shape, **options):
    return lambda tensors: tensors | {name: torch.ones(shape, **options)}


NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
K_NORM, ATTENTION = "model.layers.0.self_attn.k_norm.weight", "model.layers.1.self_attn.q_proj.bias"
BROKEN = {
    "the last norm": ("qwen2", lacks(NORM), f"missing from its weights: {NORM}. "),
    "all biases": ("qwen2", lacks(".bias"), "self_attn.q_proj.bias, model.layers.0.self_attn.k_proj.bias"),
    "how many": ("qwen2", lacks(".bias"), "and 3 more"),
    "a norm of Qwen3's keys": ("qwen3", lacks(K_NORM), f"missing from its weights: {K_NORM}"),
    "the head": ("qwen2", lacks(HEAD), f"missing from its weights: {HEAD}"),
    "the embedding": ("tied", lacks(EMBEDDING), f"missing from its weights: {EMBEDDING}"),
    "a layer more": ("qwen2", has("model.layers.2.mlp.up_proj.weight", 96, 64), "model.layers.2.mlp.up_proj.weight"),
    "a bias more": ("qwen3", has(ATTENTION, 128), f"in no model of its config.json: {ATTENTION}"),
    "misshapen": ("qwen2", has(NORM, 32), f"{NORM} has the shape [32]: must be [64]"),
    "too few rows": ("qwen2", has(EMBEDDING, 300, 64), f"{EMBEDDING} has the shape [300, 64]: must be [330, 64]"),
    "integers": ("qwen2", has(NORM, 64, dtype=torch.int8), f"{NORM} is stored as I8"),
    "a tied head of its own": ("tied", has(HEAD, 330, 64), f"{HEAD} is not {EMBEDDING}, though config.json ties"),
}


def spoiled(source: Path, change, output: Path) -> Path:
    """A copy of a Hugging Face folder with changed weights."""
    output.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (output / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(source / "model.safetensors")), output / "model.safetensors", {"format": "pt"})
    return output


def errors_of_imports(root: Path, outputs: list[Path]) -> list[str]:
    messages = []
    for source in outputs:
        try:
            tiny_run.import_hf(source, root / f"{source.name}_import")
            messages.append("no error")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_an_import_names_what_is_wrong_with_the_weights(models, tmp_path):
    kinds = {kind: f"case_{i}" for i, kind in enumerate(BROKEN)}
    folders = [spoiled(models / BROKEN[k][0], BROKEN[k][1], tmp_path / name) for k, name in kinds.items()]
    for kind, message in zip(
        BROKEN, ranks.run_ranks(errors_of_imports, 1, tmp_path, folders, meet=False)[0], strict=True
    ):
        assert message.startswith("UserError: ") and BROKEN[kind][2] in message, (kind, message)
        assert len(message) < 400, kind
    assert not list(tmp_path.glob("*_import*"))


def test_copies_and_derived_tensors_are_no_surplus(models, tmp_path):
    def with_copies(tensors):
        inverse = torch.ones(8)  # as Llama 2 was published
        return tensors | {HEAD: tensors[EMBEDDING].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": inverse}

    source = spoiled(models / "tied", with_copies, tmp_path / "hf")
    ranks.run_ranks(tiny_run.import_hf, 1, source, tmp_path / "nemo", meet=False)
    ranks.run_ranks(tiny_run.export, 1, tmp_path / "nemo", "hf", tmp_path / "back", meet=False)
    back, original = (load_file(f / "model.safetensors") for f in (tmp_path / "back", models / "tied"))
    assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in original)


def errors_of_exports(root: Path, cases: dict[str, dict]) -> dict[str, str]:
    """Export a checkpoint whose config.json was changed by each case."""
    import shutil

    messages = {}
    for i, (kind, change) in enumerate(cases.items()):
        checkpoint = root / f"checkpoint_{i}"
        shutil.copytree(root / "nemo", checkpoint)
        (checkpoint / "manifest.json").unlink(missing_ok=True)  # it would tell of the change first
        path = checkpoint / "context" / "huggingface" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        for to in ("hf", "nemo"):
            try:
                tiny_run.export(checkpoint, to, root / f"export_{i}_{to}")
                messages[f"{kind}, {to}"] = "no error"
            except Exception as error:
                messages[f"{kind}, {to}"] = f"{type(error).__name__}: {error}"
    return messages


EXPORTS = {
    "unknown key": ({"logit_scale": 0.5}, "logit_scale = 0.5"),
    "missing rows": ({"vocab_size": 346}, "its embedding has 330 rows"),
    "missing norms": (
        {"model_type": "qwen3", "head_dim": 16, "architectures": None},
        "in the model only: module.decoder.layers.self_attention.k_layernorm",
    ),
    "missing head": ({"tie_word_embeddings": True}, "In the file only: module.output_layer.weight"),
    "misshapen": (
        {"intermediate_size": 64},
        "linear_fc1.weight has the shape [2, 192, 64], but the model's has [2, 128",
    ),
    "missing layers": (
        {"num_hidden_layers": 3, "layer_types": None},
        "layer_norm_weight has the shape [2, 64], but the model's has [3, 64]",
    ),
}


def test_an_export_names_what_is_wrong_with_the_weights(models):
    cases = {kind: change for kind, (change, _) in EXPORTS.items()}
    for kind, message in ranks.run_ranks(errors_of_exports, 1, models, cases, meet=False)[0].items():
        reason = EXPORTS[kind.rpartition(",")[0]][1]
        assert message.startswith("UserError: ") and reason in message, (kind, message)
        assert len(message) < 400, kind
    assert not [path for path in models.glob("export_*") if path.is_dir()]

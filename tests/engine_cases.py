"""What Transformer Engine does in this project, from the import to the rollouts: on a GPU with its kernels
(`stack/test_gpu.py`), on a CPU over their stand-in (`engine/test_engine_cases.py`). `root` is the folder's fixture."""

from pathlib import Path

import pytest
import ranks
import tiny_run
import torch

from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.reporting.rows import read_metrics


def train_steps(config: TrainConfig) -> list[dict]:
    from nemo_tsdkd.megatron.train import train

    train(config)
    return read_metrics(Path(config.run_dir, "metrics.jsonl"))


# bf16 carries 3 digits through 2 layers, FP8's e4m3 a good one through both.
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp8_tensorwise", 0.15)])
def test_training_learns_and_follows_fp32(precision, tolerance, root, tmp_path):
    steps = {}
    for name in {"fp32", "bf16", precision}:
        config = tiny_run.config(root, tmp_path / name, 1)
        config.precision.name, config.teacher.precision = name, "fp32" if name == "fp32" else "bf16"
        config.precision.first_last_layers_bf16 = False  # of two layers none would be left for FP8
        steps[name] = ranks.run_ranks(train_steps, 1, config, meet=False)[0]
    losses = {name: [step["loss"] for step in rows] for name, rows in steps.items()}
    assert losses[precision][-1] < losses[precision][0]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=tolerance)
    assert (losses[precision] == losses["bf16"]) == (precision == "bf16")


def test_a_run_resumes_from_its_checkpoint(root, tmp_path):
    losses = {}
    for name, parts in {"whole": (4,), "in parts": (2, 4)}.items():
        config = tiny_run.config(root, tmp_path / name, 1)
        config.optim.min_lr = config.optim.lr  # the schedule of two steps is that of four
        for config.max_steps in parts:
            (tmp_path / name / "FINISHED").unlink(missing_ok=True)
            losses[name] = [step["loss"] for step in ranks.run_ranks(train_steps, 1, config, meet=False)[0]]
    assert losses["in parts"] == pytest.approx(losses["whole"], rel=1e-4)  # attention's backward adds in any order


def test_an_exported_model_is_the_imported_one(root, tmp_path):
    """Transformer Engine's layers begin on the meta device; `root`'s import went the other way."""
    from safetensors.torch import load_file

    ranks.run_ranks(tiny_run.export, 1, root / "student", "hf", tmp_path / "hf", meet=False)
    source, back = (
        load_file(root / "hf_student" / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert source.keys() == back.keys() and all(torch.equal(source[name], back[name]) for name in source)


def test_rollouts_run(root, tmp_path):
    config = tiny_run.config(root, tmp_path, 1, lmbda=1.0)
    steps = ranks.run_ranks(train_steps, 1, config, meet=False)[0]
    assert all(0 < step["response_length_mean"] <= config.rollout.max_new_tokens for step in steps)


def greedy_gap(checkpoint: Path) -> float:
    """How far, at worst, the model's own forward puts another token above the one that decoding chose."""
    from megatron_chunk import build

    from nemo_tsdkd.config.schema import RolloutConfig
    from nemo_tsdkd.data.tokenizer import Vocabulary
    from nemo_tsdkd.megatron.rollout.generation import generate

    model = build(checkpoint).cuda().eval()
    prompts = [[3, 1, 4, 1, 5], [9, 2], list(range(20, 57))]
    responses = generate(
        model,
        prompts,
        rollout_config=RolloutConfig(max_new_tokens=16, batch_size=2, temperature=0.0),
        sample_ids=[0, 1, 2],
        seed=1,
        step=0,
        vocabulary=Vocabulary(tiny_run.STUDENT_VOCAB, 0, ()),
        max_length=64,
        tp_group=None,
        pp_group=None,
    )
    gaps = []
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = torch.tensor([prompt + response.token_ids]).cuda()
        places = torch.arange(tokens.shape[1]).cuda()[None]
        with torch.no_grad():
            logits = model(tokens, places, None)[0, len(prompt) - 1 : -1].float()
        logits = logits[:, : tiny_run.STUDENT_VOCAB]
        chosen = logits.gather(1, torch.tensor(response.token_ids).cuda()[:, None])
        gaps.append((logits.max(1, keepdim=True).values - chosen).max().item() / logits.std().item())
    return max(gaps)


def test_decoding_without_transformer_engines_forward_gives_the_same(root):
    assert ranks.run_ranks(greedy_gap, 1, root / "student")[0] < 1e-2  # TF32 may round the products of either

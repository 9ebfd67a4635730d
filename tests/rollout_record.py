"""Recorded rollouts: what a revision's `generate` wrote, in fp32, for drawn prompts and rules at every layout.

    PYTHONPATH=.:tests python tests/rollout_record.py

draws the cases anew and records what the code of this checkout writes in `stack/rollouts.json`, where all layouts agree
(they must). The file in the repository is that of the decoder that read every token back to the host: whatever decodes
now is compared with it, so record again only after a change that is meant to change responses.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import ranks
import tiny_run
from megatron_chunk import build

FILE = Path(__file__).parent / "stack" / "rollouts.json"
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]  # TP, PP
Written = list[tuple[list[int], bool]]  # (token ids, truncated) of every prompt


def draw(rng: random.Random) -> dict[str, Any]:
    """One call of `generate`: ragged prompts, more of them than rows, and a rule of sampling."""
    count, vocab = rng.randint(5, 14), tiny_run.STUDENT_VOCAB
    return {
        "prompts": [[rng.randrange(300) for _ in range(rng.randint(1, rng.choice((6, 40))))] for _ in range(count)],
        "sample_ids": rng.sample(range(10_000), count),
        "seed": rng.randrange(1000),
        "step": rng.randrange(1000),
        "max_length": rng.choice((45, 70, 110)),
        "eos_ids": rng.sample(range(vocab), rng.choice((0, 12, 40))),
        "rules": {
            "batch_size": rng.choice((1, 2, 3, 4, 5, 9)),
            "max_new_tokens": rng.choice((1, 9, 33, 50, 50)),
            "temperature": rng.choice((0.0, 1.0, 1.5, 2.0)),
            "top_k": rng.choice((0, 0, 9, 40)),
            "top_p": rng.choice((1.0, 1.0, 0.8, 0.95)),
        },
    }


def cases() -> list[dict[str, Any]]:
    """Drawn ones; the last three are bent to hold every rule of sampling at once, a long cache and many rows."""
    *drawn, rules, long, wide = (draw(random.Random(number)) for number in (0, 1, 2, 3, 4, 6, 7, 8, 9))
    rules["rules"] |= {"batch_size": 4, "max_new_tokens": 50, "temperature": 1.5, "top_k": 40, "top_p": 0.9}
    long["max_length"], long["eos_ids"] = 150, long["eos_ids"][:3]
    long["rules"] |= {"batch_size": 3, "max_new_tokens": 100}
    rng = random.Random("wide")
    wide |= {
        "prompts": [[rng.randrange(300) for _ in range(rng.randint(1, 20))] for _ in range(40)],
        "sample_ids": rng.sample(range(10_000), 40),
        "eos_ids": rng.sample(range(tiny_run.STUDENT_VOCAB), 12),
        "rules": {"batch_size": 24, "max_new_tokens": 40, "temperature": 1.5},
    }
    return [*drawn, rules, long, wide]


def student(checkpoint: Path, tp: int, pp: int) -> Any:
    """This rank's shard of `tiny_run`'s student."""
    from nemo_tsdkd.checkpoints.shape import padded_vocab_size

    return build(
        checkpoint, tp, pp, vocab_size=padded_vocab_size(tiny_run.STUDENT_VOCAB, tensor_model_parallel_size=tp)
    )


def written(model: Any, case: dict[str, Any], **rules: Any) -> Written:
    """What `generate` writes for a case on this rank, with other `rules` where given."""
    from megatron.core import parallel_state

    from nemo_tsdkd.config.schema import RolloutConfig
    from nemo_tsdkd.data.tokenizer import Vocabulary
    from nemo_tsdkd.megatron.rollout.generation import generate

    responses = generate(
        model,
        case["prompts"],
        rollout_config=RolloutConfig(**case["rules"] | rules),
        sample_ids=case["sample_ids"],
        seed=case["seed"],
        step=case["step"],
        vocabulary=Vocabulary(tiny_run.STUDENT_VOCAB, 0, tuple(case["eos_ids"])),
        max_length=case["max_length"],
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return [(response.token_ids, response.truncated) for response in responses]


def all_written(checkpoint: Path, tp: int, pp: int, drawn: list[dict[str, Any]]) -> list[Written]:
    model = student(checkpoint, tp, pp)
    return [written(model, case) for case in drawn]


def reused(root: Path, run_dir: Path) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Four training steps at TP 2 whose rollouts serve two steps each: token ids of the responses to each step, and
    where the student's weights lay in each."""
    from nemo_tsdkd.megatron import model
    from nemo_tsdkd.megatron.train import train

    steps, addresses = [], []

    class Recording(model.TSDKDModel):
        def respond(self, samples, step):
            responses = super().respond(samples, step)
            addresses.append([p.data_ptr() for p in self.module.parameters()])
            steps.append([response.token_ids for response in responses])
            return responses

    import nemo_tsdkd.megatron.train as module

    module.TSDKDModel = Recording
    config = tiny_run.config(root, run_dir, 2, lmbda=1.0, tensor_model_parallel_size=2)
    config.max_steps, config.rollout.reuse, config.checkpoint.every_n_steps = 4, 2, 100
    config.rollout.batch_size = 3
    train(config)
    return steps, addresses


def weights(root: Path) -> str:
    """Which model wrote: a hash of its file."""
    return hashlib.sha256((root / "hf_student" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    ranks.PRELOAD = ["torch", "nemo_tsdkd.megatron.train"]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        root, drawn = tiny_run.prepare(Path(folder)), cases()
        by_rank = [
            rank
            for tp, pp in LAYOUTS
            for rank in ranks.run_ranks(all_written, tp * pp, root / "student", tp, pp, drawn)
        ]
        assert all(rank == by_rank[0] for rank in by_rank), "layouts differ"
        steps = [steps for steps, _ in ranks.run_ranks(reused, 2, root, root / "run", meet=False)]
        assert steps[0] == steps[1], "ranks differ"
        # Of the reused ones only what was written before the first update, which is the loss's.
        record = {"revision": revision, "weights": weights(root), "reused": steps[0][0]}
    record["cases"] = [case | {"written": responses} for case, responses in zip(drawn, by_rank[0], strict=True)]
    FILE.write_text(json.dumps(record) + "\n")
    print(sum(len(ids) for case in record["cases"] for ids, _ in case["written"]), "tokens")


if __name__ == "__main__":
    main()

"""Rollouts against Hugging Face's `generate` on the same weights, prompts and threads: response tokens a second.

    python benchmarks/rollout.py [--models student teacher] [--threads 1] [--repeats 3] [--json FILE]

Random Qwen2 models of the demo's sizes, in one process, sampling at temperature 1. `fixed`: 32 prompts of 28 tokens,
128 new tokens each; no padding, Hugging Face's best case. `mixed`: prompts of 8 to 48 tokens, and each token ends the
response with a chance of about 1/40, so lengths spread from 1 to the limit of 128; once for the 32 prompts of one
batch, once for 128 prompts. Hugging Face takes batches of 32 in the prompts' order, padded on the left; `re-forward`
is the same without a KV cache. `benchmarks/step.py` has a whole training step's times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BATCH, NEW_TOKENS, VOCAB = 32, 128, 112
MODELS = ("student", "teacher")  # recipes of the demo
EOS = list(range(40, 43))
# prompts, their shortest and longest length, ids that end a response
WORKLOADS = {"fixed": (32, 28, 28, []), "mixed, one batch": (32, 8, 48, EOS), "mixed": (128, 8, 48, EOS)}


def run_python(*arguments: str) -> str:
    """Standard output of a Python process of its own; RuntimeError with the end of its errors where it fails."""
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stdout


def save_models(folder: Path, name: str) -> None:
    """A random model of a recipe's size as a Hugging Face folder and its import, `hf` and `nemo` in `folder`."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from nemo_tsdkd.demo.pretrain import RECIPES

    recipe = RECIPES[name]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "hf")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", unk_token="0").save_pretrained(folder / "hf")
    run_python("-m", "nemo_tsdkd", "import", "--source", str(folder / "hf"), "--output", str(folder / "nemo"))


def prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(50, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def ours(folder: Path) -> Callable[[list[list[int]], list[int]], int]:
    """A function from prompts and end ids to the number of response tokens it wrote."""
    from nemo_tsdkd.config.schema import ParallelConfig, RolloutConfig
    from nemo_tsdkd.data.tokenizer import Vocabulary
    from nemo_tsdkd.megatron.checkpoints.load import gpt_config
    from nemo_tsdkd.megatron.rollout.generation import generate
    from nemo_tsdkd.megatron.rollout.responses import load_for_decoding

    model = load_for_decoding(gpt_config(folder / "nemo"), folder / "nemo", ParallelConfig())

    def write(batch: list[list[int]], eos_ids: list[int]) -> int:
        responses = generate(
            model,
            batch,
            config=RolloutConfig(max_new_tokens=NEW_TOKENS, batch_size=BATCH),
            sample_ids=list(range(len(batch))),
            seed=0,
            step=0,
            vocabulary=Vocabulary(VOCAB, 0, tuple(eos_ids)),
            max_length=256,
            tp_group=None,
            pp_group=None,
        )
        return sum(len(response.token_ids) for response in responses)

    return write


def hugging_face(folder: Path, use_cache: bool) -> Callable[[list[list[int]], list[int]], int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()

    def write_batch(batch: list[list[int]], eos_ids: list[int]) -> int:
        longest = max(map(len, batch))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            top_k=None,
            eos_token_id=eos_ids or None,
            pad_token_id=0,
            use_cache=use_cache,
        )[:, longest:]
        ended = torch.isin(out, torch.tensor(eos_ids)).cumsum(-1)
        return int((ended.roll(1, -1).index_fill(-1, torch.tensor(0), 0) == 0).sum())  # the first end token counts

    def write(batch: list[list[int]], eos_ids: list[int]) -> int:
        return sum(write_batch(batch[i : i + BATCH], eos_ids) for i in range(0, len(batch), BATCH))

    return write


def measure(folder: Path, repeats: int) -> list[dict]:
    """Every workload on every implementation, in turns; the fastest of `repeats` runs each."""
    import torch

    torch.manual_seed(0)
    writers = {
        "ours": ours(folder),
        "Hugging Face": hugging_face(folder, use_cache=True),
        "re-forward": hugging_face(folder, use_cache=False),
    }
    rows = []
    for workload, (*shape, eos_ids) in WORKLOADS.items():
        best: dict[str, tuple[float, int]] = {}
        for repeat in range(repeats + 1):
            for name, write in writers.items():
                if name == "re-forward" and workload != "fixed":
                    continue  # minutes, to show the same
                start = time.perf_counter()
                tokens = write(prompts(*shape), eos_ids)
                speed = tokens / (time.perf_counter() - start)
                if repeat and speed > best.get(name, (0.0, 0))[0]:  # the first round warms up
                    best[name] = speed, tokens
        for name, (speed, tokens) in best.items():
            row = {"workload": workload, "writer": name, "response_tokens": tokens, "tokens_per_second": speed}
            rows.append(row | {"times_hugging_face": speed / best["Hugging Face"][0]})
    return rows


def in_world_of_one(folder: Path, threads: int, repeats: int) -> list[dict]:
    from nemo_tsdkd.distributed import launch

    launch.environment()
    import torch

    from nemo_tsdkd.distributed.groups import process_group

    torch.set_num_threads(threads)
    with process_group():
        return measure(folder, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--folder", type=Path, help="measure the models in this folder, in this process; print JSON")
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(in_world_of_one(args.folder, args.threads, args.repeats)))
        return
    print(f"batch {BATCH}, {args.threads} threads, fastest of {args.repeats}, response tokens a second")
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            save_models(Path(folder), name)
            options = ("--threads", str(args.threads), "--repeats", str(args.repeats))
            out = run_python(__file__, "--folder", folder, *options)
        for row in json.loads(out.splitlines()[-1]):
            rows.append({"model": name, **row})
            figures = f"{row['tokens_per_second']:9.0f} tokens/s{row['times_hugging_face']:7.2f} x Hugging Face"
            print(f"{name:9}{row['workload']:18}{row['writer']:14}{figures}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

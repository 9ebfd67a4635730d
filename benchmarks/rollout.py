"""Rollouts against Hugging Face's `generate` on the same weights, prompts and threads: response tokens a second.

    python benchmarks/rollout.py [--models student teacher] [--threads 1] [--repeats 3] [--json FILE]
        [--before CHECKOUT]

Random Qwen2 models of the demo's sizes, in one process, sampling at temperature 1. `fixed`: 32 prompts of 28 tokens,
128 new tokens each; no padding, Hugging Face's best case. `mixed`: prompts of 8 to 48 tokens, and each token ends the
response with a chance of about 1/40, so lengths spread from 1 to the limit of 128; once for the 32 prompts of one
batch, once for 128 prompts. Hugging Face takes batches of 32 in the prompts' order, padded on the left; `re-forward`
is the same without a KV cache. `benchmarks/step.py` has a whole training step's times.

The rows of `ours` also count, over a whole rollout, what a token costs the host. A token here is one pass of the
model, which writes one token of each sequence. `operators_per_token` counts operators that do work (views and
allocations do none), `host_reads_per_token` the waits for a value from the device. `graphs` is the number of shapes in
which a decode step came at least twice: as many CUDA graphs are captured where there is CUDA. With `--before`, the code
of another checkout is measured in the same turns, in a process of its own; its figures carry the prefix `before_`.
Implementations run in turns: the ratio to Hugging Face is that of the fastest runs, and in brackets stand the least and
the largest ratio within one turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

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


Generate = Callable[[list[list[int]], list[int]], int]  # from prompts and end ids to the number of response tokens


class Ours:
    """`generate` of the package that is imported, on the models in `folder`."""

    def __init__(self, folder: Path) -> None:
        from nemo_tsdkd.config.schema import ParallelConfig, RolloutConfig
        from nemo_tsdkd.megatron.checkpoints.load import gpt_config
        from nemo_tsdkd.megatron.rollout.generation import generate
        from nemo_tsdkd.megatron.rollout.responses import load_for_decoding

        # Another checkout may be from the time when the argument was called `config`.
        self.config_name = "rollout_config" if "rollout_config" in signature(generate).parameters else "config"
        self.model = load_for_decoding(gpt_config(folder / "nemo"), folder / "nemo", ParallelConfig())
        self.config = RolloutConfig(max_new_tokens=NEW_TOKENS, batch_size=BATCH)

    def _arguments(self, eos_ids: list[int]) -> dict[str, Any]:
        from nemo_tsdkd.data.tokenizer import Vocabulary

        vocabulary = Vocabulary(VOCAB, 0, tuple(eos_ids))
        return {self.config_name: self.config, "vocabulary": vocabulary, "tp_group": None, "pp_group": None}

    def __call__(self, batch: list[list[int]], eos_ids: list[int]) -> int:
        from nemo_tsdkd.megatron.rollout.generation import generate

        call = {"sample_ids": list(range(len(batch))), "seed": 0, "step": 0, "max_length": 256}
        responses = generate(self.model, batch, **call, **self._arguments(eos_ids))
        return sum(len(response.token_ids) for response in responses)

    def graphs(self, batch: list[list[int]], eos_ids: list[int]) -> int:
        from nemo_tsdkd.megatron.rollout.generation import Decoder

        with Decoder(self.model, **self._arguments(eos_ids)) as decoder:
            decoder.generate(batch, sample_ids=list(range(len(batch))), seed=0, step=0, max_length=256)
            return sum(runs > 1 for runs in decoder.regions.runs.values())


def counted(generate: Generate, batch: list[list[int]], eos_ids: list[int]) -> dict[str, float]:
    """What a token of a rollout costs the host: see the file's docstring."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    total = {"operators": 0, "host_reads": 0, "passes": 0}

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name, returns = func._schema.name.split("::")[1], func._schema.returns
            view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
            total["operators"] += not (view or "empty" in name or name == "_unsafe_view")
            total["passes"] += name == "embedding"
            return func(*args, **(kwargs or {}))

    class Reads(TorchFunctionMode):
        """A CPU's operators show no read: where the tensor lies, there it is read."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            total["host_reads"] += name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")
            return func(*args, **(kwargs or {}))

    with Reads(), Operators():
        generate(batch, eos_ids)
    passes = total.pop("passes")
    return {f"{name}_per_token": count / passes for name, count in total.items()}


def serve(folder: Path) -> None:
    """Answer lines of JSON on standard input: the process that `OtherCheckout` starts."""
    ours = Ours(folder)
    for line in sys.stdin:
        request = json.loads(line)
        given = request["prompts"], request["eos_ids"]
        print("answer", json.dumps(counted(ours, *given) if request["count"] else ours(*given)), flush=True)


class OtherCheckout:
    """`Ours` of another checkout, in a process of its own."""

    def __init__(self, folder: Path, checkout: Path, threads: int) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--folder", folder, "--threads", threads, "--serve"]
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(list(map(str, command)), text=True, env=environment, cwd=checkout, **pipes)

    def _ask(self, batch: list[list[int]], eos_ids: list[int], count: bool) -> Any:
        self._process.stdin.write(json.dumps({"prompts": batch, "eos_ids": eos_ids, "count": count}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"the process of the other checkout ended with {self._process.wait()}")

    def __call__(self, batch: list[list[int]], eos_ids: list[int]) -> int:
        return self._ask(batch, eos_ids, count=False)

    def counted(self, batch: list[list[int]], eos_ids: list[int]) -> dict[str, float]:
        return self._ask(batch, eos_ids, count=True)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def hugging_face(folder: Path, use_cache: bool) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval().to(device)

    def generate_batch(batch: list[list[int]], eos_ids: list[int]) -> int:
        longest = max(map(len, batch))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
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
        ended = torch.isin(out.cpu(), torch.tensor(eos_ids)).cumsum(-1)
        return int((ended.roll(1, -1).index_fill(-1, torch.tensor(0), 0) == 0).sum())  # the first end token counts

    def generate(batch: list[list[int]], eos_ids: list[int]) -> int:
        return sum(generate_batch(batch[i : i + BATCH], eos_ids) for i in range(0, len(batch), BATCH))

    return generate


def measure(folder: Path, repeats: int, before: OtherCheckout | None) -> list[dict]:
    """Every workload on every implementation, in turns; the fastest of `repeats` runs each."""
    import torch

    torch.manual_seed(0)
    ours = Ours(folder)
    implementations: dict[str, Generate] = {
        "ours": ours,
        "Hugging Face": hugging_face(folder, use_cache=True),
        "re-forward": hugging_face(folder, use_cache=False),
    }
    if before:
        implementations["before"] = before
    rows = []
    for workload, (*shape, eos_ids) in WORKLOADS.items():
        runs: dict[str, list[tuple[float, int]]] = {}  # by implementation: (tokens a second, response tokens)
        for repeat in range(repeats + 1):
            for name, generate in implementations.items():
                if name == "re-forward" and workload != "fixed":
                    continue  # minutes, to show the same
                start = time.perf_counter()
                tokens = generate(prompts(*shape), eos_ids)
                speed = tokens / (time.perf_counter() - start)
                if repeat:  # the first round warms up
                    runs.setdefault(name, []).append((speed, tokens))
        turns = {name: spread(runs, name) for name in runs}
        best = {name: max(speeds) for name, speeds in runs.items()}
        speed_before = best.pop("before", (0.0, 0))[0]
        for name, (speed, tokens) in best.items():
            row = {"workload": workload, "writer": name, "response_tokens": tokens, "tokens_per_second": speed}
            rows.append(row | {"times_hugging_face": speed / best["Hugging Face"][0], **turns[name]})
            if name == "ours":
                rows[-1] |= counted(ours, prompts(*shape), eos_ids)
                rows[-1]["graphs"] = ours.graphs(prompts(*shape), eos_ids)
                if before:
                    earlier = {"tokens_per_second": speed_before} | before.counted(prompts(*shape), eos_ids)
                    earlier |= {"times_hugging_face": speed_before / best["Hugging Face"][0], **turns["before"]}
                    rows[-1] |= {f"before_{key}": value for key, value in earlier.items()}
    return rows


def spread(runs: dict[str, list[tuple[float, int]]], name: str) -> dict[str, float]:
    """The least and the largest ratio of `name` to Hugging Face in one turn."""
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(runs[name], runs["Hugging Face"], strict=True)]
    return {"least_ratio": min(ratios), "largest_ratio": max(ratios)}


def in_world_of_one(threads: int, work: Callable[[], Any]) -> Any:
    from nemo_tsdkd.distributed import launch

    launch.environment()
    import torch

    from nemo_tsdkd.distributed.groups import process_group

    torch.set_num_threads(threads)
    with process_group():
        return work()


def measured(folder: Path, threads: int, repeats: int, checkout: Path | None) -> list[dict]:
    before = OtherCheckout(folder, checkout, threads) if checkout else None
    try:
        return in_world_of_one(threads, lambda: measure(folder, repeats, before))
    finally:
        if before:
            before.close()


def speed_shown(row: dict, prefix: str) -> str:
    turns = f"({row[prefix + 'least_ratio']:.2f}-{row[prefix + 'largest_ratio']:.2f})"
    return f"{row[prefix + 'tokens_per_second']:9.0f} tokens/s{row[prefix + 'times_hugging_face']:7.2f} {turns} x HF"


def shown(row: dict) -> str:
    line = speed_shown(row, "")
    for prefix in ("", "before_"):
        if f"{prefix}operators_per_token" in row:
            if prefix:
                line += f"\n{'before':>45}{speed_shown(row, prefix)}"
            line += f", {row[prefix + 'operators_per_token']:.0f} operators"
            line += f" and {row[prefix + 'host_reads_per_token']:.3f} host reads a token"
    return line + (f", {row['graphs']} graphs" if "graphs" in row and "before_tokens_per_second" not in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of another revision, measured in turns")
    parser.add_argument("--folder", type=Path, help="measure the models in this folder, in this process; print JSON")
    parser.add_argument("--serve", action="store_true", help="with --folder: generate on request")
    args = parser.parse_args()
    if args.serve:
        in_world_of_one(args.threads, lambda: serve(args.folder))
        return
    if args.folder:
        print(json.dumps(measured(args.folder, args.threads, args.repeats, args.before)))
        return
    print(f"batch {BATCH}, {args.threads} threads, fastest of {args.repeats}, response tokens a second")
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            save_models(Path(folder), name)
            options = ["--threads", str(args.threads), "--repeats", str(args.repeats)]
            options += ["--before", str(args.before)] if args.before else []
            out = run_python(__file__, "--folder", folder, *options)
        for row in json.loads(out.splitlines()[-1]):
            rows.append({"model": name, **row})
            print(f"{name:9}{row['workload']:18}{row['writer']:14}{shown(row)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

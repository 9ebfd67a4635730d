"""What FP8 changes of the objective's choices: the demo's trained teacher and student, in FP8 and in bf16.

    python benchmarks/fp8_teacher.py [--problems 64] [--runs runs] [--json FILE]

Transformer Engine's own Python runs the recipes over the tests' stand-in of its kernels: the bytes, scales and layers
are those of a GPU, the products are taken in fp32. Student and teacher read the student's own sampled answers to
held-out problems; what the objective decides on (openers, most uncertain tokens, gates, the teacher's order of the
student's ten candidates) is then compared with the same decision where both models are bf16. fp32 shows how much of a
difference bf16 itself makes. The models are trained on the first call (minutes) and kept in the demo's cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the harness of ranks, the oracle's definitions
sys.path.append(str(Path(__file__).parents[1] / "tests" / "engine"))  # the stand-in

import oracle
import ranks
import te_stand_in
import torch
from torch import Tensor

from nemo_tsdkd.demo.pretrain import pretrained
from nemo_tsdkd.demo.tasks import held_out_problems

THRESHOLD, TOP_K, FRACTION = 0.1, 10, 0.1  # the paper's
ROWS = [  # (what runs in FP8 or fp32, its precision, first and last layer in bf16)
    ("teacher", "fp32", False),
    ("teacher", "fp8_tensorwise", True),
    ("teacher", "fp8_tensorwise", False),
    ("teacher", "fp8_blockwise", True),
    ("teacher", "fp8_blockwise", False),
    ("student", "fp32", False),
    ("student", "fp8_tensorwise", False),
    ("student", "fp8_blockwise", False),
]
PAD = 128  # lengths that FP8 multiplies


def answers(folder: Path, problems: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of each problem, sampled from the student by transformers at temperature 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    pairs = []
    for problem in problems:
        chat = [{"role": "user", "content": problem["question"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        rule = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 100}
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **rule)[0].tolist()
        pairs.append((prompt, whole[len(prompt) :]))
    return pairs


def load(model, folder: Path) -> None:
    """Set a whole Megatron model's weights from a Hugging Face folder."""
    from nemo_tsdkd.megatron.checkpoints.hf import config_from_hf
    from nemo_tsdkd.megatron.checkpoints.pieces import Conversion, HFWeights, one_layer, pieces_of

    config = one_layer(config_from_hf(folder))
    config.gradient_accumulation_fusion = False
    single = config.configure_model(tokenizer=None)
    conversion = Conversion(HFWeights(folder), single, model.config.params_dtype)
    tensors: dict[str, list[Tensor]] = {}
    for piece in pieces_of(single, model.config.num_layers):
        name = piece.name.replace("layers.0.", f"layers.{piece.layer}.")
        tensors.setdefault(name, []).append(conversion.fill(piece).data)
    for name, parameter in model.named_parameters():
        parts = [part.view(part.shape[-parameter.dim() :]) for part in tensors[name]]
        parameter.data.copy_(torch.cat(parts))


def response_logits(folder: Path, name: str, first_last: bool, pairs: list, vocab_size: int) -> list[Tensor]:
    """Logits [L, V] in fp32 of each response, of the Megatron model of a Hugging Face folder in a precision."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemo_tsdkd.checks.precision import model_settings
    from nemo_tsdkd.megatron.checkpoints.hf import config_from_hf

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    config = config_from_hf(folder)
    config.gradient_accumulation_fusion = False
    for field, value in model_settings(name, first_last).items():
        setattr(config, field, value)
    model = config.configure_model(tokenizer=None).to(config.params_dtype).eval()
    load(model, folder)
    logits = []
    for prompt, response in pairs:
        tokens = prompt + response
        padded = torch.tensor([tokens + [0] * (-len(tokens) % PAD)])
        with torch.no_grad():
            out = model(padded, torch.arange(padded.shape[1])[None], None)[0].float()
        logits.append(out[len(prompt) - 1 : len(tokens) - 1, :vocab_size])
    return logits


def all_logits(folders: dict[str, Path], pairs: list, vocab_size: int) -> dict:
    """By (which model, precision, first and last layer in bf16): logits of every response."""
    wanted = [("teacher", "bf16", False), ("student", "bf16", False), *ROWS]
    return {
        (which, name, edge): response_logits(folders[which], name, edge, pairs, vocab_size)
        for which, name, edge in wanted
    }


def decisions(student: list[Tensor], teacher: list[Tensor]) -> dict:
    """What the objective decides on, of all responses, by the oracle's definitions."""
    openers, uncertain, gates, rankings = [], [], [], []
    for z, t in zip(student, teacher, strict=True):
        h_s, h_t = (oracle.entropy(x.double().log_softmax(-1)) for x in (z, t))
        openers.append(oracle.opener_length(h_s.tolist(), THRESHOLD))
        uncertain.append(set(oracle.uncertain_positions(h_s.tolist(), FRACTION)))
        gates.append(torch.sigmoid(h_s - h_t))
        rankings.append([oracle.teacher_ranking(z[i], t[i], TOP_K) for i in range(len(z))])
    return {"openers": openers, "uncertain": uncertain, "gates": torch.cat(gates), "rankings": rankings}


def difference(ours: dict, theirs: dict) -> dict[str, float]:
    """Shares that differ; of the gates, quantiles of the absolute change; of the rankings, pairs of candidates that
    changed places where both rank the same ten."""
    chosen = sum(len(b - a) for a, b in zip(ours["uncertain"], theirs["uncertain"], strict=True))
    change = (ours["gates"] - theirs["gates"]).abs()
    pairs = [
        (a, b)
        for of_ours, of_theirs in zip(ours["rankings"], theirs["rankings"], strict=True)
        for a, b in zip(of_ours, of_theirs, strict=True)
    ]
    turned = [turned_pairs(a, b) for a, b in pairs if set(a) == set(b)]
    return {
        "openers": share(a != b for a, b in zip(ours["openers"], theirs["openers"], strict=True)),
        "uncertain": chosen / sum(map(len, theirs["uncertain"])),
        **{f"gate_q{q}": change.quantile(q / 100).item() for q in (50, 90, 99)},
        "rankings": share(a != b for a, b in pairs),
        "best": share(a[0] != b[0] for a, b in pairs),
        "pairs_turned": sum(turned) / len(turned),
    }


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def turned_pairs(a: list[int], b: list[int]) -> float:
    place = {token: i for i, token in enumerate(b)}
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    return share(place[a[i]] < place[a[j]] for i, j in pairs)


COLUMNS = {
    "openers": "openers",
    "uncertain": "uncertain tokens",
    "gate_q50": "gate, median",
    "gate_q90": "90 %",
    "gate_q99": "99 %",
    "rankings": "rankings",
    "best": "best candidate",
    "pairs_turned": "pairs turned",
}


def table(rows: list[dict]) -> str:
    lines = ["| not bf16 | precision | first, last layer | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|" + "---|" * (3 + len(COLUMNS)))
    for row in rows:
        cells = [f"{row[name]:.4f}" if name.startswith("gate") else f"{row[name]:.1%}" for name in COLUMNS]
        edge = "bf16" if row["first_last_layers_bf16"] else row["precision"].split("_")[0]
        lines.append(f"| {row['model']} | `{row['precision']}` | {edge} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(folders: dict[str, Path], problems: list[dict]) -> tuple[list[dict], list[int]]:
    """A row for each of ROWS, and the lengths of the responses it speaks of. Call `te_stand_in.start_ranks` first.

    Args:
        folders: Hugging Face folders of the "student" and the "teacher".
        problems: with a `question` each; the student answers them.
    """
    from transformers import AutoTokenizer

    pairs = answers(folders["student"], problems)
    vocab_size = len(AutoTokenizer.from_pretrained(folders["student"]))
    logits = ranks.run_ranks(all_logits, 1, folders, pairs, vocab_size, timeout=1800)[0]
    reference = {which: logits[which, "bf16", False] for which in folders}
    expected = decisions(reference["student"], reference["teacher"])
    rows = []
    for which, name, edge in ROWS:
        changed = reference | {which: logits[which, name, edge]}
        row = difference(decisions(changed["student"], changed["teacher"]), expected)
        rows.append({"model": which, "precision": name, "first_last_layers_bf16": edge} | row)
    return rows, [len(response) for _, response in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="holds the demo's cache of models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folders = pretrained(args.runs / "demo-cache")
    te_stand_in.start_ranks()
    rows, lengths = differences(folders, held_out_problems(args.problems))
    print(f"{len(lengths)} responses of {sum(lengths)} tokens; differences from both models in bf16\n")
    print(table(rows))
    if args.json:
        args.json.write_text(
            json.dumps({"responses": len(lengths), "tokens": sum(lengths), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

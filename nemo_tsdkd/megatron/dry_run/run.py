"""Run two steps of one rank's training, as `nemo-tsdkd train` would, and say what it held, sent and computed.

Every row of the batch has `data.seq_length` tokens, all of them response tokens but the first: the worst case. A
rollout decodes `DECODED` tokens after prompts that leave room for no more, so that the cache is at its longest.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.utils.data import Dataset

from nemo_tsdkd.checks.precision import pad_to_multiple
from nemo_tsdkd.config.integers import ceil_div, round_up
from nemo_tsdkd.config.schema import TILE_LOGITS
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.dataset import Sample
from nemo_tsdkd.data.global_batch import GlobalBatch
from nemo_tsdkd.data.tokenizer import Vocabulary
from nemo_tsdkd.distributed.hidden_exchange import HiddenExchange
from nemo_tsdkd.distributed.job import Job
from nemo_tsdkd.distributed.layout import teacher_layout
from nemo_tsdkd.distributed.ledger import Ledger, Phase
from nemo_tsdkd.megatron import model as model_module
from nemo_tsdkd.megatron import teacher, teacher_pass, train
from nemo_tsdkd.megatron.checkpoints import load
from nemo_tsdkd.megatron.checkpoints.hf import config_from_hf
from nemo_tsdkd.megatron.datamodule import SampleModule
from nemo_tsdkd.megatron.dry_run import kernels
from nemo_tsdkd.megatron.dry_run.fakes import fake_ranks, fake_values
from nemo_tsdkd.megatron.dry_run.stage_shapes import StageShapes
from nemo_tsdkd.megatron.rollout.decoding import KVCache
from nemo_tsdkd.megatron.rollout.generation import Decoder
from nemo_tsdkd.megatron.strategy import TSDKDStrategy
from nemo_tsdkd.plan.request import HIDDEN_STATES, Request, Result
from nemo_tsdkd.rollout.schedule import Response

DECODED = 3  # tokens of a rollout: the first comes with the prefill
PHASES = {"rollout_s": "rollout", "teacher_s": "teacher", "student_s": "student"}  # by the name of their time


def dry_run(request: Request, announce: Callable[[], Any] = lambda: None) -> Result:
    """What `request.rank` of the job does, on fake tensors, in this process, which is of no other use afterwards.

    Args:
        announce: is called when an act of a step begins.
    """
    config, share = fewer_micro_batches(as_on_gpu(request.config))
    environment(config, request.rank)
    job = fake_ranks(request.rank, config.parallel.world_size, config.student_world_size)
    StageShapes().install()
    with fake_values(request.opener_share):
        return observed(config, request, job, share, announce)


def observed(
    config: TrainConfig, request: Request, job: Job, share: float = 1.0, announce: Callable[[], Any] = lambda: None
) -> Result:
    """The same in the process groups and on the kind of tensors that there are."""
    ledger = Ledger(request.flops_per_s, request.bytes_per_s, request.kernel_s)
    kernels.install(ledger, config)
    _skip_weights(request)
    _watch(ledger, config, announce)
    vocabulary = Vocabulary(request.vocabulary, 0, (0,))
    with ledger:
        ledger.enter("load")
        if job.teacher_only:
            phases, groups = _teacher_steps(config, vocabulary, job, ledger)
        else:
            watch = _Steps(ledger)
            model = train.build_model(config, vocabulary, job)
            model.is_on_policy = lambda step: config.rollout.lmbda > 0
            model._generate = _worst_rollout(model, model._generate, request.config)
            train.build_trainer(config, [watch]).fit(model, datamodule=SampleModule(_Rows(config), config))
            phases, groups = watch.phases, watch.groups
    written = {name: phase.as_json() for name, phase in phases.items()}
    return Result(request.rank, written, decode_steps=DECODED - 1, share=share, groups=groups)


def as_on_gpu(config: TrainConfig) -> TrainConfig:
    """`config` with what a GPU would choose, for two steps, each on-policy if the run can be."""
    assert config.precision.name in ("bf16", "fp32") and config.teacher.precision in ("bf16", "fp32")
    length = round_up(config.data.seq_length, pad_to_multiple(config, on_gpu=True))
    return replace(
        config,
        max_steps=2,
        data=replace(config.data, seq_length=length),
        rollout=replace(config.rollout, lmbda=float(config.rollout.lmbda > 0), reuse=1),
        objective=replace(config.objective, tile_logits=config.objective.tile_logits or TILE_LOGITS["cuda"]),
        optim=replace(config.optim, warmup_steps=0),
        validation=replace(config.validation, path=None),
        samples=replace(config.samples, every_n_steps=0),
        progress_bar=False,
    )


def fewer_micro_batches(config: TrainConfig) -> tuple[TrainConfig, float]:
    """`config` with a global batch that shows a step's whole course, and its share of the job's batch.

    That is one micro-batch more than the pipeline has stages, and at least one of the teacher's for each of its
    data-parallel ranks. The rest of a step repeats them.
    """
    most = config.global_batch_size // config.data_parallel_size
    rows = min(config.full_micro_batch_size, most)
    block = rows * config.data_parallel_size
    teacher_rows = 0 if config.one_layout else teacher_layout(config).data * config.teacher.micro_batch_size
    count = max(config.parallel.pipeline_model_parallel_size + 1, ceil_div(teacher_rows, block))
    if most % rows or count * rows >= most:
        return config, 1.0
    return replace(config, global_batch_size=count * block), count * rows / most


def _teacher_steps(
    config: TrainConfig, vocabulary: Vocabulary, job: Job, ledger: Ledger
) -> tuple[dict[str, Phase], dict[str, list[int]]]:
    """What a rank of the teacher's nodes does in two steps."""
    models = train.model_files(config, vocabulary)
    own = teacher.Teacher(models.teacher_gpt_config, models.teacher, train_config=config, job=job, pad_id=0)
    names, groups = group_names(own)
    ledger.name_groups(names)
    load = ledger.phases["load"]
    rows = _Rows(config)
    samples = [rows[index] for index in range(config.global_batch_size)]
    batch = GlobalBatch.of(samples, [sample.response_ids for sample in samples])
    for _ in range(config.max_steps):
        ledger.enter("teacher")
        ledger.restart()
        own._step(batch)
    return {"load": load, "teacher": ledger.phases["teacher"]}, groups


def environment(config: TrainConfig, rank: int) -> None:
    """Lightning reads a rank's place from variables, as torchrun sets them."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    node, local = divmod(rank, config.parallel.gpus_per_node)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(config.student_world_size),
        LOCAL_RANK=str(local),
        LOCAL_WORLD_SIZE=str(config.parallel.gpus_per_node),
        GROUP_RANK=str(node),
        TORCHELASTIC_RUN_ID="dry-run",
        MASTER_ADDR="localhost",
        MASTER_PORT="1",
    )


class _Rows(Dataset[Sample]):
    """Rows of full length: one prompt token, then the response."""

    def __init__(self, config: TrainConfig) -> None:
        self.length = config.data.seq_length
        self.rows = config.global_batch_size

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, [1], [1] * (self.length - 1))


def _worst_rollout(model: Any, generate: Any, job_config: TrainConfig) -> Any:
    """`TSDKDModel._generate` that decodes a few tokens after the longest prompts, as many as a rank of the job answers,
    and returns responses of full length."""

    def worst(samples: Sequence[Sample], step: int) -> list[Response]:
        length = model.train_config.data.seq_length
        prompts = job_config.global_batch_size // job_config.data_parallel_size
        generate([Sample(index, [1] * (length - DECODED), []) for index in range(prompts)], step)
        return [Response([1] * (length - 1), truncated=True) for _ in samples]

    return worst


def _skip_weights(request: Request) -> None:
    """Shapes come from both models' config.json; there are no weights to read."""

    def gpt_config(path: Path) -> Any:
        config = config_from_hf(path)
        which = "student" if str(path) == request.config.student.path else "teacher"
        if which in request.layers:
            config.num_layers = request.layers[which]
        fp32 = (request.config.precision.name if which == "student" else request.config.teacher.precision) == "fp32"
        config.params_dtype, config.bf16, config.fp16 = (torch.float32 if fp32 else torch.bfloat16), not fp32, False
        config.transformer_layer_spec = kernels.layer_spec
        config.bias_activation_fusion, config.apply_rope_fusion = True, False  # the stand-in's rope is fused already
        config.gradient_accumulation_fusion = config.masked_softmax_fusion = config.persist_layer_norm = False
        return config

    def load_head(config: Any, checkpoint: Path, tp_group: Any) -> Any:
        shape = config.vocab_size // tp_group.size(), config.hidden_size
        return torch.zeros(shape, dtype=config.params_dtype)

    train.resolve = lambda path, cache: Path(path)
    train.gpt_config = gpt_config
    model_module.load_weights = load.load_weights = lambda module, checkpoint: None
    teacher.load_head = load_head


def _watch(ledger: Ledger, config: TrainConfig, announce: Callable[[], Any]) -> None:
    """Tell the ledger which phase runs, and what the tensors are that one part of the code allocates."""
    timed = TSDKDStrategy._timed

    @contextmanager
    def phase(self: TSDKDStrategy, name: str) -> Iterator[None]:
        announce()
        ledger.enter(PHASES[name])
        with timed(self, name):
            yield
        if name == "student_s":
            ledger.enter("optimizer")

    TSDKDStrategy._timed = phase
    decode = Decoder._step

    def step(self: Decoder, *args: Any) -> None:
        with ledger.inside("decode"):
            decode(self, *args)

    Decoder._step = step
    for owner, name, label in (
        (DistributedDataParallel, "__init__", "student weights and gradients"),
        (DistributedOptimizer, "__init__", "optimizer"),
        (teacher_pass, "frozen_model", "teacher weights"),
        (teacher, "load_head", "teacher weights"),
        (KVCache, "__init__", "KV cache"),
        (model_module.TSDKDModel, "_objective_output", "loss"),
        (_OffloadedWeights, "restore", "teacher weights"),
        (teacher_pass.TeacherPass, "_buffer", HIDDEN_STATES),
        (HiddenExchange, "exchange", HIDDEN_STATES),
    ):
        setattr(owner, name, ledger.labelled(label, getattr(owner, name)))
    teacher_pass.OffloadedWeights = _OffloadedWeights
    if config.teacher.offload_hidden_states:
        for owner, name in ((teacher_pass.TeacherPass, "_buffer"), (HiddenExchange, "exchange")):
            setattr(owner, name, ledger.on_host(getattr(owner, name)))


class _OffloadedWeights(teacher_pass.OffloadedWeights):
    """Between the passes the weights are on the host, where a dry run holds nothing."""

    def __init__(self, module: Any, keep: Any) -> None:
        self._module = module
        self._parameters = [p for p in module.parameters() if p is not keep]
        self._shapes = [p.shape for p in self._parameters]
        self.release()

    def release(self) -> None:
        for parameter in self._parameters:
            parameter.data = parameter.new_empty(0)

    def restore(self) -> None:
        for parameter, shape in zip(self._parameters, self._shapes, strict=True):
            parameter.data = parameter.new_empty(shape)


class _Steps(Callback):
    """Forgets the first step, in which Adam makes its moments; keeps what loading and the second step did."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.phases: dict[str, Phase] = {}
        self.groups: dict[str, list[int]] = {}

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self.phases["load"] = self._ledger.phases["load"]
        names, self.groups = group_names(model.teacher)
        self._ledger.name_groups(names)

    def on_train_batch_start(self, *args: Any) -> None:
        gc.collect()
        self._ledger.enter("rollout")
        self._ledger.restart()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            self.phases |= self._ledger.phases


def group_names(own: teacher.Teacher) -> tuple[dict[str, str], dict[str, list[int]]]:
    """(names for a reader by torch's names, ranks by these names) of the process groups; the first of equal groups
    names them."""
    names: dict[str, str] = {}
    ranks: dict[str, list[int]] = {"job": list(range(own.job.world_size))}
    functions = {
        "tp": parallel_state.get_tensor_model_parallel_group,
        "cp": parallel_state.get_context_parallel_group,
        "pp": parallel_state.get_pipeline_model_parallel_group,
        "dp": parallel_state.get_data_parallel_group,
        "dp-cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
        "tp-pp": parallel_state.get_model_parallel_group,
        "ep": parallel_state.get_expert_model_parallel_group,
        "embedding": parallel_state.get_embedding_group,
    }
    with own._pass.parallel_state.active() if own._pass else nullcontext():
        teachers = {f"teacher {name}": function() for name, function in functions.items() if name != "embedding"}
    students = {} if own.job.teacher_only else {name: function() for name, function in functions.items()}
    for name, group in (students | teachers).items():
        if group is not None and names.setdefault(group.group_name, name) == name:
            ranks[name] = dist.get_process_group_ranks(group)
    if not own.job.teacher_only:
        names.setdefault(dist.group.WORLD.group_name, "job")
    return names, ranks

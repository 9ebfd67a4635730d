"""`nemo-tsdkd train`: puts models, data, strategy and callbacks together and runs NeMo's trainer."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import HAVE_TE  # the same switch picks NeMo's layer spec
from transformers import PreTrainedTokenizerBase

from nemo_tsdkd.checkpoints.atomic import detect_full_disk, write_json
from nemo_tsdkd.checkpoints.best import ended_early
from nemo_tsdkd.checkpoints.manifest import step_of
from nemo_tsdkd.checkpoints.retention import set_aside, was_saved
from nemo_tsdkd.checkpoints.run_record import RunRecord, open_record, student_digest
from nemo_tsdkd.checkpoints.shape import padded_vocab_size
from nemo_tsdkd.checkpoints.start_over import begin_at_step_1
from nemo_tsdkd.checks.precision import check_engine, model_settings, plugin_settings
from nemo_tsdkd.checks.setup import check_experts
from nemo_tsdkd.config.schema import ParallelConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.dataset import PromptDataset
from nemo_tsdkd.data.held_out import load_held_out
from nemo_tsdkd.data.tokenizer import Vocabulary, check_same_tokenizer, load_tokenizer, tokenizer_digest
from nemo_tsdkd.distributed.groups import from_rank_zero, rank_zero_first
from nemo_tsdkd.distributed.job import Job, job_groups
from nemo_tsdkd.distributed.signals import STOP_SIGNALS, Stopped
from nemo_tsdkd.megatron.callbacks import ReportMetrics, RequireLock, SaveAndStop
from nemo_tsdkd.megatron.checkpoints.load import gpt_config, resolve
from nemo_tsdkd.megatron.checkpoints.save import RunCheckpoints, find_checkpoint, lock_run, mark_finished
from nemo_tsdkd.megatron.datamodule import SampleModule
from nemo_tsdkd.megatron.model import Checkpoints, TSDKDModel
from nemo_tsdkd.megatron.samples import WriteSamples
from nemo_tsdkd.megatron.strategy import TSDKDStrategy
from nemo_tsdkd.megatron.teacher import Teacher
from nemo_tsdkd.megatron.validation import HeldOut, Validate
from nemo_tsdkd.reporting.metrics import refresh_plots
from nemo_tsdkd.reporting.provenance import changed_settings, save_provenance
from nemo_tsdkd.reporting.report import refresh_report
from nemo_tsdkd.reporting.run_files import SUMMARY

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Stopped | None:
    """Run or resume the distillation of `config` on this rank; return what ended it early, if a stop signal did.

    Call `check_setup(config)` first, as the command does before NeMo is imported.

    Raises:
        UserError: a GPU, checkpoint or data set with which `config` cannot be trained, or a run folder in which another
            process trains, before any model is built; later, that another process took the run over.
        FloatingPointError: a loss or gradient that is not finite, on every rank.
        OSError: the run's disk is full.
    """
    check_engine(config)
    run_dir = Path(config.run_dir)
    with job_groups(config) as job:
        if job.teacher_only:
            run_teacher_rank(config, job)
            return None
        with lock_run(run_dir) as claim:
            checkpoint, damaged = find_checkpoint(run_dir)
            if checkpoint is None:
                from_rank_zero(lambda: begin_at_step_1(run_dir, damaged, config.checkpoint.start_over))
            elif step_of(checkpoint) >= config.max_steps or ended_early(checkpoint, config.validation.patience):
                _write_final_files(run_dir, step_of(checkpoint))
                job.agree_to_train(False)
                return None
            vocabulary, tokenizer = load_vocabulary(config)
            data = build_data(config, tokenizer, vocabulary)
            validate = build_validation(config, tokenizer)
            model = build_model(config, vocabulary, job, resumes=checkpoint is not None)
            student, digest = model.checkpoints.student, tokenizer_digest(tokenizer)
            record = from_rank_zero(lambda: _begin_attempt(config, checkpoint, damaged, student, digest))
            job.agree_to_train(True)
            checkpoints = RunCheckpoints(run_dir=run_dir, settings=config.checkpoint, claim=claim, record=record)
            patience = config.validation.patience
            save_and_stop = SaveAndStop(checkpoints, student, config.rollout.reuse, validate, patience)
            callbacks = [
                RequireLock(claim),
                *filter(None, [validate]),
                WriteSamples(run_dir, config.student.path),
                ReportMetrics(config),
                save_and_stop,
            ]
            with detect_full_disk(run_dir):
                build_trainer(config, callbacks).fit(model, datamodule=data, ckpt_path=checkpoint)
            model.teacher.stop_teacher_ranks()
            return save_and_stop.stopped


def run_teacher_rank(config: TrainConfig, job: Job) -> None:
    """Run a rank of the teacher's own nodes until the student's ranks end.

    It begins after they have imported both models. It ignores stop signals: the student's ranks decide when to stop.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if job.agree_to_train():
        vocabulary, _ = load_vocabulary(config)
        models = model_files(config, vocabulary)
        teacher = Teacher(
            models.teacher_gpt_config, models.teacher, train_config=config, job=job, pad_id=vocabulary.pad_id
        )
        teacher.serve()


def load_vocabulary(config: TrainConfig) -> tuple[Vocabulary, PreTrainedTokenizerBase]:
    """The student's tokenizer and its vocabulary. Raises UserError if the teacher's tokenizer differs."""
    tokenizer = load_tokenizer(config.student.path)
    check_same_tokenizer(tokenizer, load_tokenizer(config.teacher.path))
    return Vocabulary.of(tokenizer, config.student.path), tokenizer


def _begin_attempt(
    config: TrainConfig, checkpoint: Path | None, damaged: dict[Path, str], student: Path, tokenizer: str
) -> RunRecord:
    """Record this attempt's models and settings; return the run's record. Call it on rank 0.

    Raises:
        UserError: the run has trained another student, or for another tokenizer.
    """
    run_dir = Path(config.run_dir)
    record = open_record(run_dir, checkpoint, student_digest(student), tokenizer)
    for folder in filter(was_saved, damaged):
        set_aside(folder)  # it must not be resumed from later, after the run has written other steps
    where = f"resumes from {checkpoint.name}" if checkpoint else "begins at step 1"
    changes = changed_settings(run_dir, config)
    logger.info("%s: %s%s", run_dir, where, " with other settings:" if changes else ".")
    for change in changes:
        logger.info("  %s", change)
    save_provenance(run_dir, config)
    return record


def _write_final_files(run_dir: Path, step: int) -> None:
    """Write the final files of a run: an attempt may have been killed between its last checkpoint and them."""
    if dist.get_rank() == 0:
        ways = "A larger max_steps continues it; another run_dir begins a new run."
        logger.info("%s: this run finished at step %d. %s", run_dir, step, ways)
        write_json(run_dir / SUMMARY, {"steps": step, "finished": True})
        refresh_plots(run_dir)
        refresh_report(run_dir)
        mark_finished(run_dir)


def build_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> SampleModule:
    """The run's samples, tokenized. Raises UserError where a row is bad or none is usable."""
    off_policy = config.rollout.lmbda < 1
    data = rank_zero_first(lambda: PromptDataset.load(config.data, tokenizer, vocabulary if off_policy else None))
    return SampleModule(data, config)


def build_validation(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Validate | None:
    """The run's validation, its prompts tokenized; None without `validation.path`. Raises UserError where a row is bad
    or none is usable."""
    if config.validation.path is None:
        return None
    return Validate(config, HeldOut(rank_zero_first(lambda: load_held_out(config, tokenizer))))


def build_model(config: TrainConfig, vocabulary: Vocabulary, job: Job, resumes: bool = False) -> TSDKDModel:
    """The student with its teacher; their weights are loaded later. Raises UserError as `model_files`."""
    models = model_files(config, vocabulary)
    return TSDKDModel(
        models.student_gpt_config,
        train_config=config,
        checkpoints=models,
        vocabulary=vocabulary,
        job=job,
        optim=build_optimizer(config),
        resumes=resumes,
    )


def model_files(config: TrainConfig, vocabulary: Vocabulary) -> Checkpoints:
    """Both models' checkpoints and configurations, each in its layout and with one padded vocabulary.

    Raises:
        UserError: a folder that is no checkpoint, a model without rows for the vocabulary, experts where there may be
            none, or an objective that the vocabulary does not allow.
    """
    cache = Path(config.run_dir) / "imported"
    student, teacher = resolve(config.student.path, cache), resolve(config.teacher.path, cache)
    student_gpt, teacher_gpt = gpt_config(student), gpt_config(teacher)
    check_experts(config, student=student_gpt.num_moe_experts or 0, teacher=teacher_gpt.num_moe_experts or 0)
    vocabulary.require_rows(student=student_gpt.vocab_size, teacher=teacher_gpt.vocab_size)
    config.objective.validate_vocabulary(vocabulary.size)
    precision, layouts = config.precision, (config.parallel, config.teacher_parallel)
    student_settings = model_settings(precision.name, precision.first_last_layers_bf16)
    set_layout(student_gpt, config, layouts[0], student_settings | recompute_settings(config.parallel.recompute))
    set_layout(
        teacher_gpt, config, layouts[1], model_settings(config.teacher.precision, precision.first_last_layers_bf16)
    )
    width = padded_vocab_size(
        student_gpt.vocab_size,
        teacher_gpt.vocab_size,
        tensor_model_parallel_size=math.lcm(*(layout.tensor_model_parallel_size for layout in layouts)),
    )
    student_gpt.vocab_size = teacher_gpt.vocab_size = width
    return Checkpoints(student, teacher, student_gpt, teacher_gpt)


def recompute_settings(recompute: str, flash_attention: bool = HAVE_TE) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for `parallel.recompute`.

    Selective leaves out what Megatron's own default (`core_attn` alone) would repeat in vain where a flash kernel
    keeps no scores: the attention itself would run twice to save one number a head and token.
    """
    modules = ["mlp"] if flash_attention else ["core_attn", "mlp"]
    return {
        "none": {"recompute_granularity": None},
        "selective": {"recompute_granularity": "selective", "recompute_modules": modules},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[recompute]


def set_layout(gpt: llm.GPTConfig, config: TrainConfig, p: ParallelConfig, settings: dict[str, Any]) -> None:
    """Give one model its layout and its own settings; NeMo's strategy would do so for the student alone."""
    gpt.tensor_model_parallel_size = p.tensor_model_parallel_size
    gpt.pipeline_model_parallel_size = p.pipeline_model_parallel_size
    gpt.context_parallel_size = p.context_parallel_size
    gpt.sequence_parallel = p.sequence_parallel
    gpt.seq_length = config.data.seq_length
    if gpt.num_moe_experts:  # the teacher's
        gpt.expert_model_parallel_size = config.teacher.parallel.expert_model_parallel_size
        gpt.expert_tensor_parallel_size = 1
    gpt.variable_seq_lengths = p.pipeline_model_parallel_size > 1  # each micro-batch is padded to its own longest row
    # Megatron asks for it with variable lengths, experts or none; all-gather needs as many tokens on every rank.
    gpt.moe_token_dispatcher_type = "alltoall"
    gpt.fp16 = False
    for name, value in settings.items():
        setattr(gpt, name, value)


def build_optimizer(config: TrainConfig) -> nl.MegatronOptimizerModule:
    """Distributed Adam, its rate warmed up linearly and then a cosine down to `optim.min_lr` at the last step."""
    o, bf16 = config.optim, config.precision.name != "fp32"
    optimizer = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        clip_grad=o.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    schedule = nl.lr_scheduler.CosineAnnealingScheduler(
        max_steps=config.max_steps, warmup_steps=o.warmup_steps, constant_steps=0, min_lr=o.min_lr
    )
    return nl.MegatronOptimizerModule(config=optimizer, lr_scheduler=schedule)


def build_trainer(config: TrainConfig, callbacks: list[Any]) -> nl.Trainer:
    """NeMo's trainer with our strategy; checkpoints, logs and progress are the callbacks'."""
    p, on_gpu = config.parallel, torch.cuda.is_available()
    precision = plugin_settings(config.precision.name, config.precision.first_last_layers_bf16)
    strategy = TSDKDStrategy(
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        context_parallel_size=p.context_parallel_size,
        sequence_parallel=p.sequence_parallel,
        pipeline_dtype=precision["pipeline_dtype"],
        ckpt_async_save=config.checkpoint.async_save,
        replace_progress_bar=False,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=on_gpu,
            overlap_param_gather=False,  # the rollout reads the weights between steps: all must be there
        ),
    )
    strategy.log_train_loss = False  # the strategy reports its own, reduced over all ranks
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=p.gpus_per_node,
        num_nodes=p.num_nodes - config.teacher.nodes,
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(**precision),
        max_steps=config.max_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=callbacks,
    )

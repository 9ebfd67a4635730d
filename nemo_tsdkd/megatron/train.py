"""`nemo-tsdkd train`: puts models, data, strategy and callbacks together and runs NeMo's trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from nemo_tsdkd.checkpoint import gpt_config, padded_vocab_size, resolve
from nemo_tsdkd.config import TrainConfig
from nemo_tsdkd.data import PromptDataset, check_same_tokenizer, eos_token_ids, load_tokenizer
from nemo_tsdkd.megatron.callbacks import Report, SaveAndStop
from nemo_tsdkd.megatron.datamodule import SampleModule
from nemo_tsdkd.megatron.strategy import TSDKDStrategy
from nemo_tsdkd.metrics import save_provenance
from nemo_tsdkd.model import Checkpoints, TSDKDModel, Vocabulary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(config: TrainConfig) -> None:
    """Run or resume the distillation of `config` on this rank.

    Raises:
        ValueError: a configuration, checkpoint or data set that cannot be trained, before any model is built.
        FloatingPointError: a loss or gradient that is not finite, on every rank.
    """
    config.validate()
    run_dir = Path(config.run_dir)
    model, data = build_model(config, run_dir), build_data(config)
    if os.environ["RANK"] == "0":
        save_provenance(run_dir, config)
    callbacks = [Report(run_dir, config.progress_bar), SaveAndStop(run_dir, config.checkpoint, config.rollout.reuse)]
    build_trainer(config, callbacks).fit(model, datamodule=data)


def build_data(config: TrainConfig) -> SampleModule:
    tokenizer = load_tokenizer(config.student.path)
    check_same_tokenizer(tokenizer, load_tokenizer(config.teacher.path))
    return SampleModule(
        PromptDataset.load(config.data, tokenizer, need_response=config.rollout.lmbda < 1), config
    )


def build_model(config: TrainConfig, run_dir: Path) -> TSDKDModel:
    cache = run_dir / "imported"
    student, teacher = resolve(config.student.path, cache), resolve(config.teacher.path, cache)
    student_config, teacher_config = gpt_config(student), gpt_config(teacher)
    tokenizer = load_tokenizer(config.student.path)
    eos_ids = eos_token_ids(tokenizer, config.student.path)
    vocabulary = Vocabulary(size=len(tokenizer), pad_id=eos_ids[0], eos_ids=tuple(eos_ids))
    config.objective.validate(vocab_size=vocabulary.size)
    for gpt, precision in ((student_config, config.precision.name), (teacher_config, config.teacher.precision)):
        set_layout(gpt, config, DTYPES[precision])
    width = padded_vocab_size(
        student_config.vocab_size,
        teacher_config.vocab_size,
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
    )
    student_config.vocab_size = teacher_config.vocab_size = width
    return TSDKDModel(
        student_config, config, Checkpoints(student, teacher, teacher_config), vocabulary, build_optimizer(config)
    )


def set_layout(gpt: llm.GPTConfig, config: TrainConfig, dtype: torch.dtype) -> None:
    """Give one model the run's layout and arithmetic; NeMo's strategy would do so for the student alone."""
    p = config.parallel
    gpt.tensor_model_parallel_size = p.tensor_model_parallel_size
    gpt.pipeline_model_parallel_size = p.pipeline_model_parallel_size
    gpt.context_parallel_size = p.context_parallel_size
    gpt.sequence_parallel = p.sequence_parallel
    gpt.seq_length = config.data.seq_length
    gpt.variable_seq_lengths = p.pipeline_model_parallel_size > 1  # each micro-batch is padded to its own longest row
    gpt.params_dtype = gpt.pipeline_dtype = dtype
    gpt.bf16 = dtype == torch.bfloat16
    gpt.fp16 = False


def build_optimizer(config: TrainConfig) -> nl.MegatronOptimizerModule:
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
    p, on_gpu = config.parallel, torch.cuda.is_available()
    bf16 = config.precision.name != "fp32"
    strategy = TSDKDStrategy(
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        context_parallel_size=p.context_parallel_size,
        sequence_parallel=p.sequence_parallel,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        ckpt_async_save=config.checkpoint.async_save,
        ckpt_optim_fully_reshardable=True,  # resume on another TP x PP x DP
        replace_progress_bar=False,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=on_gpu,
            overlap_param_gather=False,  # the rollout reads the weights between steps: they must be whole
        ),
    )
    strategy.log_train_loss = False  # the strategy reports its own, reduced over the whole world
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=p.gpus_per_node,
        num_nodes=p.num_nodes,
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16) if bf16 else None,
        max_steps=config.max_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        callbacks=callbacks,
    )

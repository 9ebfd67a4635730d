"""A NeMo checkpoint as this rank's shard of a Megatron model. Imported in the tests, built inside their ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build(checkpoint: Path, tp: int = 1, pp: int = 1, cp: int = 1, **change: Any):
    """The shard in training mode, with `change`d fields of its config; the first one sets up Megatron's groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemo_tsdkd.megatron.checkpoints.load import gpt_config, load_weights

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
        )
        model_parallel_cuda_manual_seed(1)
    config = gpt_config(checkpoint)
    config.tensor_model_parallel_size, config.pipeline_model_parallel_size = tp, pp
    config.context_parallel_size = cp
    config.pipeline_dtype = config.params_dtype
    for name, value in change.items():
        setattr(config, name, value)
    model = config.configure_model(tokenizer=None)
    load_weights(model, checkpoint)
    return model

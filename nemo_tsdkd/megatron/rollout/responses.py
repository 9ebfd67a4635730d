"""`nemo-tsdkd generate`: one model generates a response to every prompt of a data set."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from nemo.collections import llm
from transformers import PreTrainedTokenizerBase

from nemo_tsdkd.checkpoints.shape import padded_vocab_size
from nemo_tsdkd.config.schema import ParallelConfig
from nemo_tsdkd.config.train_config import TrainConfig
from nemo_tsdkd.data.dataset import PromptDataset
from nemo_tsdkd.data.response_shards import Shards
from nemo_tsdkd.data.tokenizer import Vocabulary, load_tokenizer, response_text
from nemo_tsdkd.distributed.groups import from_rank_zero, long_timeout_group, process_group, rank_zero_first
from nemo_tsdkd.distributed.progress import on_rank_zero
from nemo_tsdkd.megatron.checkpoints.load import frozen_model, gpt_config, resolve
from nemo_tsdkd.megatron.rollout.generation import Decoder
from nemo_tsdkd.rollout.schedule import Response


def load_for_decoding(config: llm.GPTConfig, checkpoint: Path, parallel: ParallelConfig) -> GPTModel:
    """This rank's shard of a NeMo checkpoint's model in the dtype of its file; sets up Megatron's TP x PP groups.

    What is left of the world is data parallel, context-parallel ranks of the training layout too.

    Args:
        config: the checkpoint's (`gpt_config`); its parallel sizes and padded vocabulary are set here.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(0)  # Megatron draws initial weights, all of which are then read from the file
    config.tensor_model_parallel_size, config.pipeline_model_parallel_size = tp, pp
    config.pipeline_dtype = config.params_dtype
    config.vocab_size = padded_vocab_size(config.vocab_size, tensor_model_parallel_size=tp)
    return frozen_model(config, checkpoint)


def write_responses(config: TrainConfig, which: str, shards: Shards) -> None:
    """Generate a response to every prompt of `config.data` that no shard holds yet. Call it on all ranks.

    A response depends on the weights, the prompt, `seed` and the prompt's place in the data set, not on the layout
    or on interruptions (`generation.Decoder`).
    """
    path = getattr(config, which).path
    parallel = config.layout_of(which)
    block = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    tokenizer = load_tokenizer(path)
    vocabulary = Vocabulary.of(tokenizer, path)
    with process_group():
        prompts = rank_zero_first(lambda: PromptDataset.load(config.data, tokenizer))
        all_ranks = long_timeout_group()
        copies = dist.get_world_size() // block
        # Only rank 0 lists the shards: on a network file system other ranks may see them later.
        shards.size, missing = from_rank_zero(lambda: _claim(shards, config, which, len(prompts), copies))
        checkpoint = resolve(path, Path(config.run_dir) / "imported")
        model_config = gpt_config(checkpoint)
        vocabulary.require_rows(**{which: model_config.vocab_size})
        model = load_for_decoding(model_config, checkpoint, parallel)
        tp_group = parallel_state.get_tensor_model_parallel_group()
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        groups = {"tp_group": tp_group, "pp_group": pp_group}
        with Decoder(model, rollout_config=config.rollout, vocabulary=vocabulary, **groups) as decoder:
            generate = partial(decoder.generate, seed=config.seed, step=0, max_length=config.data.seq_length)
            own = {
                shard: shards.rows_of(shard, len(prompts))
                for shard in missing[parallel_state.get_data_parallel_rank() :: copies]
            }
            done = 0
            with on_rank_zero(dist.get_rank(), "prompt", sum(map(len, own.values()))) as display:
                for shard, rows in own.items():
                    start = time.perf_counter()
                    responses = generate([prompts[i].prompt_ids for i in rows], sample_ids=list(rows))
                    if tp_group.rank() == pp_group.rank() == 0:
                        shards.write(shard, _records(prompts, tokenizer, rows, responses))
                    tokens = sum(len(response.token_ids) for response in responses)
                    done += len(rows)
                    if display:
                        display.show(done, f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
        dist.barrier(all_ranks)  # a copy without shards left may wait hours for the others


def _records(
    prompts: PromptDataset, tokenizer: PreTrainedTokenizerBase, rows: range, responses: list[Response]
) -> list[dict[str, Any]]:
    return [
        {
            "index": row,
            "prompt": prompts.prompt(row),
            "response": response_text(tokenizer, response.token_ids),
            "response_ids": response.token_ids,
            "truncated": response.truncated,
        }
        for row, response in zip(rows, responses, strict=True)
    ]


def _claim(shards: Shards, config: TrainConfig, which: str, rows: int, copies: int) -> tuple[int, list[int]]:
    shards.claim(config, which, rows, copies)
    return shards.size, shards.missing(rows)

"""The memory arithmetic's figures of a layer are those of the tensors that Transformer Engine's layers hold."""

from pathlib import Path

import pytest
import ranks
import torch
from ledger import Ledger
from megatron_chunk import build

from nemo_tsdkd.checkpoints.shape import ModelShape
from nemo_tsdkd.checks.memory import per_gpu
from nemo_tsdkd.config.train_config import TrainConfig

ROWS, LENGTH = 1, 512


def held(checkpoint: Path, tp: int, recompute: str) -> dict[str, int]:
    """Bytes of activations: what the second layer keeps for its backward pass, and the most that a prefill holds."""
    from nemo_tsdkd.checks.precision import model_settings
    from nemo_tsdkd.megatron.rollout.decoding import KVCache, decoding
    from nemo_tsdkd.megatron.train import recompute_settings

    settings = model_settings("bf16") | recompute_settings(recompute, flash_attention=True)
    model = build(checkpoint, tp=tp, sequence_parallel=tp > 1, gradient_accumulation_fusion=False, **settings)
    model.post_process = False
    tokens = torch.randint(0, 300, (ROWS, LENGTH))
    ledger, marks = Ledger(), []
    for module in (model.decoder.layers[1], model.decoder.final_layernorm):  # the beginning and the end of a layer
        module.register_forward_pre_hook(lambda *_: marks.append(ledger.held))
    cache = KVCache(model, ROWS, LENGTH)
    with ledger:
        for tensor in (*model.parameters(), cache._memory, cache._rotations):
            tensor.detach()  # known from here on
        out = model(tokens, torch.arange(LENGTH)[None], None)
        del out
        with torch.no_grad(), decoding(model, cache):
            before = ledger.reset()
            cache.begin_prefill(slice(0, ROWS), LENGTH)
            hidden = model.embedding(tokens, position_ids=None)
            model.decoder(hidden_states=hidden, attention_mask=None)
    return {"activations": marks[1] - marks[0], "prefill": ledger.peak - before}


def counted(shape: ModelShape, tp: int, recompute: str) -> dict[str, int]:
    config = TrainConfig(global_batch_size=ROWS)
    config.data.seq_length = LENGTH
    config.parallel.tensor_model_parallel_size = config.parallel.gpus_per_node = tp
    config.parallel.sequence_parallel, config.parallel.recompute = tp > 1, recompute
    memory = per_gpu(config, shape, shape)
    stage_input = 2 * ROWS * LENGTH * shape.hidden // tp
    return {"activations": (memory.activations - stage_input) // shape.layers, "prefill": memory.prefill}


@pytest.mark.parametrize(("tp", "recompute"), [(1, "none"), (2, "none"), (2, "selective"), (2, "full")])
def test_the_bytes_of_a_layer(tp, recompute, root):
    measured = ranks.run_ranks(held, tp, root / "student", tp, recompute)[0]
    expected = counted(ModelShape.of_folder(root / "student"), tp, recompute)
    # Besides, each norm keeps an fp32 number a token, and recompute its random state.
    assert measured["activations"] == pytest.approx(expected["activations"], rel=0.02)
    if tp == 1:  # at TP 2 the norm, which on a CPU is several operations, holds more than so narrow an MLP
        assert measured["prefill"] == pytest.approx(expected["prefill"], rel=0.02)

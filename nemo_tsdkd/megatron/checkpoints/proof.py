"""The proof of a conversion: the logits of a NeMo checkpoint are those of transformers' model for the same weights.

Both models are computed layer by layer from the files, so that a rank holds one layer of either. The proof shares no
table of names with the conversion: transformers names its own parameters, Megatron names and places its own.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from nemo.collections import llm
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from nemo_tsdkd.distributed.progress import on_rank_zero
from nemo_tsdkd.megatron.checkpoints.pieces import HFWeights, Piece, one_layer, pieces_of
from nemo_tsdkd.megatron.checkpoints.unpickling import checkpoint_errors
from nemo_tsdkd.megatron.gpt import hidden_states_only, vocab_parallel_logits

logger = logging.getLogger(__name__)

# One short text is enough: a wrong weight in any layer changes every logit.
_SAMPLE = "Ann has 3 boxes with 12 eggs each and sells 7 eggs. How many are left? 3 * 12 = 36 and 36 - 7 = 29."
_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of the logits' norm; Transformer Engine multiplies fp32 in TF32


@torch.no_grad()
def require_equal_logits(hf_folder: Path, checkpoint: Path, config: llm.GPTConfig, assets: Path) -> None:
    """Compare a NeMo checkpoint with a Hugging Face folder on a short text, both in fp32, on the GPU where there is
    one, since Transformer Engine's layers need it. Collective over a world without model parallelism: each rank reads
    some of the layers.

    Args:
        hf_folder: the weights, and config.json as their author wrote it.
        checkpoint: NeMo's.
        config: of its model.
        assets: the same model's tokenizer, in a form that the installed transformers reads.

    Raises:
        RuntimeError: their logits differ by more than fp32 rounding.
    """
    tokens = AutoTokenizer.from_pretrained(assets)(_SAMPLE, return_tensors="pt").input_ids.cuda()
    theirs, ours = _HuggingFace(hf_folder), _Megatron(checkpoint, config, tokens)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hidden = [theirs.embed(tokens), ours.embed()] if rank == 0 else [None, None]
    with on_rank_zero(rank, "layer", config.num_layers, only_long=True) as display:
        for first in range(0, config.num_layers, ranks):
            layers = range(first, min(first + ranks, config.num_layers))
            mine = first + rank if first + rank in layers else None
            ours.load(mine)
            if mine is not None:
                theirs.load(mine)
            for owner, _ in enumerate(layers):
                if rank == owner:
                    hidden = [theirs.layer(hidden[0]), ours.layer(hidden[1])]
                hidden = _broadcast(hidden, owner)
            if display:
                display.show(layers.stop, "compared with Hugging Face's")
    error = 0.0
    if rank == 0:
        expected, logits = theirs.logits(hidden[0]), ours.logits(hidden[1])
        error = ((logits[..., : expected.shape[-1]] - expected).norm() / expected.norm()).item()
    errors = [error]
    dist.broadcast_object_list(errors, 0)
    tolerance = _TOLERANCE["cuda" if torch.cuda.is_available() else "cpu"]
    if not errors[0] <= tolerance:  # NaN too
        raise RuntimeError(
            f"{hf_folder}: Megatron's logits differ from Hugging Face's by {errors[0]:.1e} of their norm."
        )
    if rank == 0:
        logger.info("%s: Megatron's logits differ from Hugging Face's by %.1e of their norm.", hf_folder, error)


def _broadcast(hidden: list[Tensor | None], owner: int) -> list[Tensor | None]:
    if dist.get_world_size() == 1:
        return hidden
    both = [[None if h is None else h.cpu() for h in hidden]]
    dist.broadcast_object_list(both, owner)
    return [None if h is None else h.to(torch.cuda.current_device()) for h in both[0]]


class _HuggingFace:
    """transformers' model with one layer, whose weights are read when they are needed. Hidden states `[1, S, H]`."""

    def __init__(self, folder: Path) -> None:
        config = config_as_written(folder)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        body = self._model.model
        body.rotary_emb = type(body.rotary_emb)(config=config).to(torch.cuda.current_device())
        self._norm, body.norm = body.norm, nn.Identity()
        self._tied, self._weights = config.tie_word_embeddings, HFWeights(folder)

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        device = torch.cuda.current_device()
        tensors = {n: self._weights.read(prefix + n, torch.float32).to(device) for n, _ in module.named_parameters()}
        module.load_state_dict(tensors, assign=True)
        return module

    def embed(self, tokens: Tensor) -> Tensor:
        table = self._weights.read("model.embed_tokens.weight", torch.float32)
        return table[tokens.cpu()].to(tokens.device)

    def load(self, layer: int) -> None:
        self._fill(self._model.model.layers[0], f"model.layers.{layer}.")

    def layer(self, hidden: Tensor) -> Tensor:
        return self._model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        self._model.model.layers[0].to("meta")
        name = "model.embed_tokens.weight" if self._tied else "lm_head.weight"
        head = self._weights.read(name, torch.float32).to(hidden.device)
        return self._fill(self._norm, "model.norm.")(hidden) @ head.t()


class _Megatron:
    """Megatron's model with one layer, filled from a checkpoint. Hidden states `[S, 1, H]`. The embedding and the head
    are on rank 0 only. Collective: building it, and `load`."""

    def __init__(self, checkpoint: Path, config: llm.GPTConfig, tokens: Tensor) -> None:
        self._folder, self._dtype, self._tokens = checkpoint, config.params_dtype, tokens
        self._positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        single = one_layer(config)
        single.params_dtype, single.bf16, single.fp16 = torch.float32, False, False
        gpt = single.configure_model(tokenizer=None).to(torch.cuda.current_device(), torch.float32).eval()
        self._gpt, self._parameters = gpt, dict(gpt.named_parameters())
        self._pieces: dict[int | None, list[Piece]] = defaultdict(list)
        for piece in pieces_of(gpt, config.num_layers):
            self._pieces[piece.layer].append(piece)
        self._norm, gpt.decoder.final_layernorm = gpt.decoder.final_layernorm, None  # behind the last layer only
        if dist.get_rank() > 0:
            self._pieces[None] = [piece for piece in self._pieces[None] if "final_layernorm" in piece.name]
            gpt.embedding.to("meta")
            if not gpt.share_embeddings_and_output_weights:
                gpt.output_layer.to("meta")
        self.load(None)

    def load(self, layer: int | None) -> None:
        """Read a layer, or what is outside of the layers."""
        pieces = self._pieces[layer]
        state = {
            str(i): piece.filled(torch.empty(piece.place.local_shape, dtype=self._dtype))
            for i, piece in enumerate(pieces)
        }
        with checkpoint_errors(self._folder):
            state = dist_checkpointing.load(state, str(self._folder / "weights"), validate_access_integrity=False)
        read: dict[str, list[Tensor]] = defaultdict(list)
        for i, piece in enumerate(pieces):
            read[piece.name].append(state[str(i)])
        for name, parts in read.items():
            parameter = self._parameters[name]
            parameter.copy_(torch.cat([part.view(part.shape[-parameter.dim() :]) for part in parts]))

    def embed(self) -> Tensor:
        return self._gpt.embedding(self._tokens, self._positions)

    def layer(self, hidden: Tensor) -> Tensor:
        with hidden_states_only(self._gpt):
            return self._gpt(self._tokens, self._positions, None, decoder_input=hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return vocab_parallel_logits(self._gpt, self._norm(hidden)).transpose(0, 1).to(hidden.device)


def config_as_written(folder: Path) -> PretrainedConfig:
    """transformers' config, its rotary embedding and number of experts set from config.json by hand.

    transformers 4 passes over transformers 5's `rope_parameters` and `num_local_experts`, and the import's own reading
    of them is what the comparison has to prove: it is not used here.
    """
    config, written = AutoConfig.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    if position := written.get("rope_parameters"):
        config.rope_theta = position.get("rope_theta", config.rope_theta)
        config.rope_scaling = position
    if experts := written.get("num_local_experts"):
        config.num_experts = experts
    return config

"""The sections of the configuration: every field a user may set, its default, and the rules within a section.

`train_config.py` puts the sections together.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from nemo_tsdkd.config import validation

_DIRECT_ONLY = {"gate_rule": "identity", "indirect_kd_alpha": 0.0, "entropy_weight": 0.0, "divergence": "jsd"}
# The fields that a preset sets. A baseline is the paper's objective with terms switched off; the public trainer's
# arithmetic has its own choices in place of these fields.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reference": {
        "opener_rule": "cumulative_entropy",
        "entropy_rule": "top_fraction",
        "gate_rule": "confidence",
        "entropy_fraction": 0.1,
        "gate_temperature": 1.0,
        "divergence": "jsd",
        "reduction": "sequence",
    },
    "gkd": _DIRECT_ONLY,
    "forward_kl": {**_DIRECT_ONLY, "beta": 0.0},
    "reverse_kl": {**_DIRECT_ONLY, "beta": 1.0},
}
HEADS = ("logits", "fused")
REDUCTIONS = ("sequence", "token")
CUDA_GRAPHS = ("auto", "off")
HORIZONS = ("constant", "linear", "cosine")
COMPILE = ("auto", "off")
RECOMPUTE = ("none", "selective", "full")
# What one tile of the objective holds by default: a CPU's cache keeps it; a GPU's launches cost little beside it.
TILE_LOGITS = {"cpu": 2**19, "cuda": 2**23}
MISSING = "???"  # a field the user must set


@dataclass
class ObjectiveConfig:
    """The TSD-KD objective (docs/math.md). Defaults are the paper's."""

    preset: str = "paper"  # paper | reference | gkd | forward_kl | reverse_kl
    beta: float = 0.9  # JSD mixture weight of the teacher; 0 and 1 are the exact KL limits
    threshold: float = 0.1  # c: share of the response's student entropy that the opener holds
    indirect_kd_alpha: float = 0.1  # weight of the indirect term
    direct_weight: float = 1.0  # weight of the direct term; the paper's is 1
    entropy_weight: float = 1.0  # weight of the entropy term
    top_k: int = 10  # candidates the student proposes at an opener position
    entropy_fraction: float = 0.1  # share of response positions whose entropy is lowered
    gate_temperature: float = 1.0  # tau of the gate
    tip_fraction: float = 0.5  # share of response positions that the rule tip chooses
    iw_gamma: float = 0.5  # what the rule importance_weight adds to the weight of the first token
    prefix_tokens: int = 100  # positions of a response that the rule prefix chooses
    random_fraction: float = 0.1  # share of response positions that the rule random_share chooses
    temperature: float = 1.0  # divides the logits of both models
    opener_rule: str = "cumulative_entropy"  # selection rules by registry name (objective/rules.py)
    entropy_rule: str = "top_fraction"
    gate_rule: str = "confidence"
    divergence: str = "jsd"  # of the direct term, by registry name (objective/terms.py)
    extra_terms: dict[str, float] = field(default_factory=dict)  # weight by registry name (objective/extra_terms.py)
    reduction: str = "sequence"  # sequence | token: every sequence of the batch weighs alike, or every response token
    head: str = "logits"  # logits | fused: fused never holds a [tokens, V/TP] tensor
    tile_logits: int = 0  # fp32 logits of one model that a rank works on at once; 0: TILE_LOGITS of its device
    compile: str = "auto"  # auto | off: on a GPU each pass over the logits is one kernel (objective/passes.py)

    def validate(self) -> None:
        """Raise UserError on the first field that breaks its rule. Names are checked by their registries."""
        validation.types(self, "objective.")
        validation.one_of("objective.preset", self.preset, list(PRESETS))
        validation.one_of("objective.head", self.head, HEADS)
        validation.one_of("objective.reduction", self.reduction, REDUCTIONS)
        validation.one_of("objective.compile", self.compile, COMPILE)
        validation.share(self, "objective.", "beta", "threshold", "entropy_fraction", "tip_fraction", "random_fraction")
        validation.require(
            self.beta in (0, 1) or 1e-3 <= self.beta <= 1 - 1e-3,
            "objective.beta",
            self.beta,
            "so near to 0 or 1 the divergence drowns in fp32's rounding",
            f"Use {round(self.beta)}, whose limit is computed exactly.",
        )
        validation.not_negative(
            self, "objective.", "indirect_kd_alpha", "direct_weight", "entropy_weight", "tile_logits", "iw_gamma"
        )
        validation.positive(self, "objective.", "top_k", "gate_temperature", "temperature", "prefix_tokens")
        validation.require(
            not self.extra_terms or self.preset == "paper",
            "objective.extra_terms",
            self.extra_terms,
            f"objective.preset = {self.preset} has no terms of others",
            "Leave them out, or take preset paper.",
        )

    def validate_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError where the indirect term has weight and a vocabulary of `vocab_size` fewer than `top_k`."""
        validation.require(
            self.top_k <= vocab_size or self.resolved().indirect_kd_alpha == 0,
            "objective.top_k",
            self.top_k,
            f"must not exceed the vocabulary ({vocab_size} tokens)",
            "Lower top_k.",
        )

    def resolved(self) -> ObjectiveConfig:
        """With the preset's fields set."""
        return replace(self, **PRESETS[self.preset])

    def validate_preset(self, named: Collection[str] = ()) -> None:
        """Raise UserError on a field that the user set and the preset would set to something else.

        Args:
            named: fields known to be set by the user, be it to their default.
        """
        validation.one_of("objective.preset", self.preset, list(PRESETS))
        for name, value in PRESETS[self.preset].items():
            given, default = getattr(self, name), getattr(type(self), name)
            validation.require(
                given == value or (given == default and name not in named),
                f"objective.{name}",
                given,
                f"objective.preset = {self.preset} sets it to {value}",
                "Leave it out, or take another preset.",
            )


@dataclass
class ModelConfig:
    """One model: a local Hugging Face folder (safetensors) or a NeMo checkpoint folder."""

    path: str = MISSING


@dataclass
class TeacherParallelConfig:
    """The teacher's own layout on its ranks; null takes the student's (parallel.*)."""

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    sequence_parallel: bool | None = None  # null: as the student, where the teacher's TP is above 1
    expert_model_parallel_size: int = 1  # of a mixture of experts: ranks of a pipeline stage that share its experts


@dataclass
class TeacherConfig(ModelConfig):
    micro_batch_size: int = 1  # rows of the teacher's forward-only pass; in one layout at most the student's
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    nodes: int = 0  # the job's last nodes hold the teacher alone; 0: it shares the student's GPUs
    offload_hidden_states: bool = False  # keep them on the host until the student's pass needs them
    offload_weights: bool = False  # keep its weights on the host between its passes
    precision: str = "bf16"  # bf16 | fp32 | fp8_tensorwise | fp8_blockwise

    def validate(self) -> None:
        validation.positive(self, "teacher.", "micro_batch_size")
        validation.not_negative(self, "teacher.", "nodes")
        for f in fields(self.parallel):
            if f.name != "sequence_parallel" and getattr(self.parallel, f.name) is not None:
                validation.positive(self.parallel, "teacher.parallel.", f.name)


@dataclass
class ParallelConfig:
    """The student's layout, and the teacher's where `teacher.parallel` leaves it open. world size = TP x PP x CP x DP;
    DP is what is left."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False  # norms and dropout on 1 / TP of a sequence's tokens
    # none | selective | full: what the student's backward pass computes a second time instead of keeping it. The
    # result is the same. Selective: each layer's MLP, two thirds of a layer's products and most of what it keeps, and
    # attention scores where no flash kernel spares them (without Transformer Engine). Full: all of a layer but its
    # input, a third more work. The teacher has no backward pass.
    recompute: str = "none"
    num_nodes: int = 1
    gpus_per_node: int = 1  # ranks on a node; processes where there is no GPU

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def pad_to_multiple(self) -> int:
        """What a padded row's length must be a multiple of, so that SP and CP (in zig-zag halves) cut it evenly."""
        sp = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return sp * (2 * self.context_parallel_size if self.context_parallel_size > 1 else 1)

    def validate(self) -> None:
        tp, pp = "tensor_model_parallel_size", "pipeline_model_parallel_size"
        validation.positive(self, "parallel.", tp, pp, "context_parallel_size", "num_nodes", "gpus_per_node")
        validation.one_of("parallel.recompute", self.recompute, RECOMPUTE)


@dataclass
class TeacherLayoutConfig(ParallelConfig):
    """The teacher's layout (`TrainConfig.teacher_parallel`). The student is dense and has no experts to share."""

    expert_model_parallel_size: int = 1


@dataclass
class PrecisionConfig:
    """The student's arithmetic. The LM head and the loss never run in FP8."""

    name: str = "bf16"  # bf16 | fp32 | fp8_tensorwise | fp8_blockwise
    first_last_layers_bf16: bool = True  # of each model in FP8, the teacher too


@dataclass
class DataConfig:
    path: str = MISSING  # .jsonl or .parquet, a folder of them, or a hub data set name
    subset: str | None = None  # of a hub data set
    split: str = "train"  # of a hub data set
    prompt_column: str = "prompt"  # text, or a list of chat messages with role and content, the last of the user
    response_column: str = "response"
    seq_length: int = 2048  # prompt + response; longer prompts are dropped and counted
    apply_chat_template: bool = True  # the tokenizer's; off: prompts are taken as they are
    limit: int | None = None  # read the first `limit` rows only

    section: ClassVar[str] = "data"  # of the configuration

    def named(self, file: object = None) -> str:
        """The field and its path, or a file of it, for messages."""
        return f"{self.section}.path = {str(file or self.path)!r}"

    def validate(self) -> None:
        validation.require(
            self.seq_length > 1, "data.seq_length", self.seq_length, "must hold a prompt and a response", "Raise it."
        )
        if self.limit is not None:
            validation.positive(self, "data.", "limit")


@dataclass
class RolloutConfig:
    """lmbda is the chance that a batch is written by the student (on-policy) instead of read from the data."""

    lmbda: float = 1.0
    max_new_tokens: int = 1024  # of a response
    # constant | linear | cosine: how max_new_tokens is reached (rollout/horizon.py); the data's responses are not cut
    horizon: str = "constant"
    horizon_from: int = 0  # most tokens of a response at the first step; 0: max_new_tokens
    horizon_to: int = 0  # at the last of horizon_steps and after it; 0: max_new_tokens
    horizon_steps: int = 0  # 0: max_steps
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    batch_size: int = 64  # sequences decoded at once on a data-parallel rank
    reuse: int = 1  # optimizer steps on one set of rollouts
    sync_every: int = 8  # decode steps between two looks of the host at which sequences have ended
    cuda_graphs: str = "auto"  # auto | off: replay decode steps as CUDA graphs where they can be captured

    def validate(self) -> None:
        validation.share(self, "rollout.", "lmbda", "top_p")
        validation.positive(self, "rollout.", "max_new_tokens", "top_p", "batch_size", "reuse", "sync_every")
        validation.one_of("rollout.cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        validation.not_negative(self, "rollout.", "temperature", "top_k")
        self._validate_horizon()

    def _validate_horizon(self) -> None:
        validation.one_of("rollout.horizon", self.horizon, HORIZONS)
        validation.not_negative(self, "rollout.", "horizon_from", "horizon_to", "horizon_steps")
        for name in ("horizon_from", "horizon_to", "horizon_steps"):
            field, value = f"rollout.{name}", getattr(self, name)
            rule = "rollout.horizon = constant has none: all steps have max_new_tokens"
            validation.require(
                value == 0 or self.horizon != "constant", field, value, rule, "Leave it out, or take linear or cosine."
            )
            rule = f"must not exceed rollout.max_new_tokens = {self.max_new_tokens}"
            validation.require(value <= self.max_new_tokens or name == "horizon_steps", field, value, rule, "Lower it.")
        validation.require(
            self.horizon == "constant" or self.lmbda > 0,
            "rollout.horizon",
            self.horizon,
            "rollout.lmbda = 0 generates nothing, and the data's responses are not cut",
            "Leave it out, or raise lmbda.",
        )


@dataclass
class OptimConfig:
    lr: float = 1e-5  # reached after a linear warm-up
    min_lr: float = 0.0  # the end of the cosine from `lr`, at max_steps
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0  # largest norm of the gradient; 0: not clipped

    def validate(self) -> None:
        validation.positive(self, "optim.", "lr")
        validation.not_negative(self, "optim.", "min_lr", "warmup_steps", "weight_decay", "clip_grad")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            validation.require(
                0 <= value < 1, f"optim.{name}", value, "must lie in [0, 1)", "Give 0 or more, less than 1."
            )
        validation.require(
            self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"must not exceed optim.lr = {self.lr}", "Lower it."
        )


@dataclass
class CheckpointConfig:
    every_n_steps: int = 100  # optimizer steps
    every_minutes: float = 30.0  # saves as well when so much time has passed: what a failure may cost at long steps
    keep_last: int = 2  # newest checkpoints kept
    keep_every: int = 0  # besides these, one each so many steps is kept for good; 0: none
    keep_best: bool = False  # save at each validation that is the best so far, and keep the best one
    start_over: bool = False  # allow a run whose checkpoints are all damaged or gone to begin again at step 1
    async_save: bool = False  # write in the background while training goes on; not with teacher.offload_hidden_states

    def validate(self) -> None:
        validation.positive(self, "checkpoint.", "every_n_steps", "every_minutes", "keep_last")
        validation.not_negative(self, "checkpoint.", "keep_every")
        validation.multiple_of("checkpoint.keep_every", self.keep_every, self.every_n_steps, "checkpoint.every_n_steps")

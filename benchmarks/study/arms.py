"""The arms of the study: what each trains, as overrides of conf/study.yaml. To add one, add an entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One objective and what writes its responses.

    Attributes:
        title: as the page shows it.
        overrides: `key=value` of the configuration.
        supervised: train the cross-entropy of the data's responses instead of the objective.
        precision: of the frozen teacher, over the tests' stand-in of Transformer Engine, the student in bf16; empty:
            both models in fp32 and Megatron's own layers.
    """

    title: str
    overrides: tuple[str, ...] = ()
    supervised: bool = False
    precision: str = ""


OFF_POLICY = "rollout.lmbda=0"
ALL_TOKENS = ("objective=reverse_kl",)
READS_TEACHER = ("objective=no_entropy",)
# Selection rules are compared under one divergence, the reverse KL of TIP's and IW-OPD's papers, without other terms.
SELECTED = ("objective.beta=1", "objective.indirect_kd_alpha=0", "objective.entropy_weight=0")

ARMS = {
    "sft": Arm("supervised, on the teacher's responses", ("objective=forward_kl", OFF_POLICY), supervised=True),
    "off_policy_kd": Arm("forward KL, on the teacher's responses", ("objective=forward_kl", OFF_POLICY)),
    "gkd": Arm("GKD: JSD 0.5", ("objective=gkd",)),
    "reverse_kl": Arm("reverse KL", ALL_TOKENS),
    "tsdkd": Arm("TSD-KD, the paper's"),
    "reference": Arm("TSD-KD, the public trainer's", ("objective=reference",)),
    "no_indirect": Arm("TSD-KD without the indirect term", ("objective.indirect_kd_alpha=0",)),
    "no_gate": Arm("TSD-KD without the gate", ("objective.gate_rule=identity",)),
    "no_entropy": Arm("TSD-KD without the entropy term", READS_TEACHER),
    "direct_only": Arm("TSD-KD's direct term alone", ("objective=direct_only",)),
    "random_opener": Arm(
        "TSD-KD, a random tenth as opener", ("objective.opener_rule=random_share", "objective.random_fraction=0.1")
    ),
    "entropy_top": Arm(
        "reverse KL, the most uncertain half",
        (*SELECTED, "objective.gate_rule=top_fraction", "objective.entropy_fraction=0.5"),
    ),
    "tip": Arm("reverse KL, TIP's half", ("objective=tip",)),
    "importance_weight": Arm("reverse KL, IW-OPD's weights", ("objective=importance_weight",)),
    "prefix": Arm(
        "reverse KL, the first 16 tokens", (*SELECTED, "objective.gate_rule=prefix", "objective.prefix_tokens=16")
    ),
    "random_share": Arm(
        "reverse KL, a random half",
        (*SELECTED, "objective.gate_rule=random_share", "objective.random_fraction=0.5"),
    ),
    "horizon": Arm(
        "reverse KL, rollouts that grow from 16 tokens",
        (*ALL_TOKENS, "rollout.horizon=linear", "rollout.horizon_from=16"),
    ),
    # Without the entropy term, all that is left reads the teacher: the ranking, the gate and the divergence.
    "precision_bf16": Arm("without the entropy term, teacher in bf16", READS_TEACHER, precision="bf16"),
    "precision_fp8_tensorwise": Arm(
        "without the entropy term, teacher in FP8, tensorwise", READS_TEACHER, precision="fp8_tensorwise"
    ),
    "precision_fp8_blockwise": Arm(
        "without the entropy term, teacher in FP8, blockwise", READS_TEACHER, precision="fp8_blockwise"
    ),
}

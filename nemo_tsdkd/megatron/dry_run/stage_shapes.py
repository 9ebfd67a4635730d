"""What a pipeline stage would receive from a stage that does not exist: its shape."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from nemo_tsdkd.megatron import model as model_module
from nemo_tsdkd.megatron import teacher_pass


class StageShapes:
    """The shapes of what a pipeline stage receives: the sender that would tell them does not exist."""

    def __init__(self) -> None:
        self._student: list[torch.Size] = []  # [B, S] of each micro-batch
        self._teacher: list[torch.Size] | None = None  # in the teacher's pass
        self._received = {"prev": 0, "next": 0}

    def install(self) -> None:
        read, forward = model_module.TSDKDModel.read, teacher_pass.TeacherPass.forward
        communicate = P2PCommunicator._communicate_shapes

        def read_and_note(model: Any, *args: Any) -> Any:
            micro_batches, hidden = read(model, *args)
            self._student = [batch["tokens"].shape for batch in micro_batches]
            self._received = dict.fromkeys(self._received, 0)
            return micro_batches, hidden

        def forward_and_note(own: Any, micro_batches: Any, rows: int) -> Any:
            self._teacher = [batch["tokens"].shape for batch in micro_batches]
            self._received = dict.fromkeys(self._received, 0)
            try:
                return forward(own, micro_batches, rows)
            finally:
                self._teacher = None

        def shapes(own: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
            communicate(own, send_next, send_prev, recv_prev, recv_next)  # counted, then known
            return tuple(
                self._next(side, own.config) if it else None for side, it in (("prev", recv_prev), ("next", recv_next))
            )

        model_module.TSDKDModel.read, teacher_pass.TeacherPass.forward = read_and_note, forward_and_note
        P2PCommunicator._communicate_shapes = shapes

    def _next(self, side: str, gpt: Any) -> list[int]:
        rows, width = (self._student if self._teacher is None else self._teacher)[self._received[side]]
        self._received[side] += 1
        tp = gpt.tensor_model_parallel_size if gpt.sequence_parallel else 1
        return [width // gpt.context_parallel_size // tp, rows, gpt.hidden_size]

"""nemo-tsdkd: token-selective dual knowledge distillation on NeMo and Megatron-core."""

__version__ = "0.1.0"

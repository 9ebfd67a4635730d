"""nemo-tsdkd: token-selective dual knowledge distillation on NeMo and Megatron-core."""

import warnings

__version__ = "0.2.0"

# torch tells users at every start that a package NeMo depends on has a new name.
warnings.filterwarnings("ignore", message="The pynvml package is deprecated")

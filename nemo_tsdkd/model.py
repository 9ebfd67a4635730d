"""The model class under the package's root; importing it brings NeMo and Megatron."""

from nemo_tsdkd.megatron.model import TSDKDModel

__all__ = ["TSDKDModel"]

"""Building blocks that are independent of images, streams and configs; they need torch only."""

from .box_ops import cxcywh_to_xyxy, generalized_box_iou, xyxy_to_cxcywh
from .mlp import MLP, joint_linear
from .ms_deform_attn import MSDeformAttn, deform_attn
from .position_encoding import SinePositionEncoding, sine_encoding
from .upsampled_conv import conv_upsampled

__all__ = [
    "MLP",
    "MSDeformAttn",
    "SinePositionEncoding",
    "conv_upsampled",
    "cxcywh_to_xyxy",
    "deform_attn",
    "generalized_box_iou",
    "joint_linear",
    "sine_encoding",
    "xyxy_to_cxcywh",
]

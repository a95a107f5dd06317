"""Building blocks that know nothing of images, streams or configs."""

from .box_ops import cxcywh_to_xyxy, generalized_box_iou, xyxy_to_cxcywh
from .linear import TokenLinear
from .mlp import MLP
from .ms_deform_attn import MSDeformAttn, deform_attn
from .position_encoding import SinePositionEncoding, sine_encoding
from .upsampled_conv import conv_upsampled

__all__ = [
    "MLP",
    "MSDeformAttn",
    "SinePositionEncoding",
    "TokenLinear",
    "conv_upsampled",
    "cxcywh_to_xyxy",
    "deform_attn",
    "generalized_box_iou",
    "sine_encoding",
    "xyxy_to_cxcywh",
]

"""Detectron2's ResNet, with the dilated last stage (DC5) that DETR uses."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone

from ...errors import UserError


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet; with ``MODEL.RESNETS.RES5_DILATION`` 2 its DC5 is torchvision's.

    Both keep ``res5`` at stride 16. Detectron2 dilates all blocks of the stage; torchvision
    (``replace_stride_with_dilation=[False, False, True]``, which DETR uses) leaves the first one
    alone, where the stride has been. With dilation 1 this is ``build_resnet_backbone``.
    """
    dilated = cfg.MODEL.RESNETS.RES5_DILATION > 1
    if dilated and cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE[-1]:
        raise UserError(
            "MODEL.RESNETS.RES5_DILATION > 1 and deformable convolutions in res5 "
            "(MODEL.RESNETS.DEFORM_ON_PER_STAGE) do not go together"
        )
    resnet = build_resnet_backbone(cfg, input_shape)
    if dilated and "res5" in resnet.stage_names:
        conv = resnet.res5[0].conv2
        conv.dilation = conv.padding = (1, 1)
    return resnet

"""A narrow ResNet of basic blocks, for small images and machines without a GPU."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ...errors import UserError


@BACKBONE_REGISTRY.register()
def build_small_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet with the widths, strides and depth of ``MODEL.SMALL_RESNET``.

    Maps are called ``res2``, ``res3``, ... as in Detectron2; the stem has stride 4. All of it is
    trained: there are no pre-trained weights that ``MODEL.BACKBONE.FREEZE_AT`` would protect.
    """
    node = cfg.MODEL.SMALL_RESNET
    stem = BasicStem(
        in_channels=input_shape.channels, out_channels=node.STEM_CHANNELS, norm=node.NORM
    )
    stages: list[list[BasicBlock]] = []
    in_channels = node.STEM_CHANNELS
    for channels, stride in zip(node.STAGE_CHANNELS, node.STAGE_STRIDES, strict=True):
        if stride > 1 and channels == in_channels:
            # Detectron2's basic block has no shortcut convolution then, and cannot be strided.
            raise UserError(
                f"MODEL.SMALL_RESNET.STAGE_CHANNELS is {node.STAGE_CHANNELS}: a stage of stride "
                f"{stride} must change the number of channels ({channels})"
            )
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                node.BLOCKS_PER_STAGE,
                stride_per_block=[stride] + [1] * (node.BLOCKS_PER_STAGE - 1),
                in_channels=in_channels,
                out_channels=channels,
                norm=node.NORM,
            )
        )
        in_channels = channels
    return ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)

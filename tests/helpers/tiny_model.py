"""Tiny models for tests: width 32, two layers, a handful of queries, images below 64 pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from batchformer_panoptic import PanopticDETR, add_batchformer_panoptic_config

NUM_THINGS = 2
NUM_CLASSES = 4

# Overrides of `tiny_cfg`: the transformer "mask2former" with its costs, losses and inference.
MASK2FORMER: dict[str, Any] = {
    "MODEL__DETR__TRANSFORMER_NAME": "mask2former",
    "MODEL__DETR__COSTS": ["class_cost", "point_mask_cost"],
    "MODEL__DETR__LOSSES": ["class_loss", "point_mask_loss"],
    "MODEL__DETR__DEC_LAYERS": 3,  # one for each level
    "MODEL__MASK_HEAD__NAME": "query_mask_head",
    "MODEL__MASK2FORMER__MASK_DIM": 24,
    "MODEL__MASK2FORMER__ENC_DIM_FEEDFORWARD": 40,
    "MODEL__MASK2FORMER__NUM_POINTS": 64,
    "MODEL__PANOPTIC__MERGE_TEST": "mask2former",
    "MODEL__PANOPTIC__INSTANCE_SCORING_TEST": "mask2former",
}


def tiny_cfg(**overrides: Any) -> CfgNode:
    """A config of a tiny panoptic model; overrides are keys with dots written as ``__``."""
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "PanopticDETR"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [128.0] * 3, [64.0] * 3
    cfg.MODEL.BACKBONE.NAME = "build_small_resnet_backbone"
    cfg.MODEL.SMALL_RESNET.STEM_CHANNELS = 8
    cfg.MODEL.SMALL_RESNET.STAGE_CHANNELS = [8, 12, 16, 20]
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    node = cfg.MODEL.DETR
    node.NUM_CLASSES, node.NUM_OBJECT_QUERIES, node.HIDDEN_DIM, node.NHEADS = NUM_CLASSES, 6, 32, 4
    node.ENC_LAYERS, node.DEC_LAYERS, node.DIM_FEEDFORWARD, node.DROPOUT = 2, 2, 48, 0.0
    cfg.MODEL.BATCHFORMER.DROPOUT = 0.0
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    cfg.MODEL.PANOPTIC.SCORE_THRESHOLD_TEST = 0.0
    cfg.merge_from_list([x for k, v in overrides.items() for x in (k.replace("__", "."), v)])
    return cfg


def tiny_model(**overrides: Any) -> PanopticDETR:
    """Build :func:`tiny_cfg` with every parameter random, biases and norms included."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg(**overrides))
    assert isinstance(model, PanopticDETR)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2.0)
                module.running_mean.normal_(std=0.2)
    return model


def random_inputs(
    sizes: Sequence[tuple[int, int]],
    counts: Sequence[int] | None = None,
    *,
    seed: int = 0,
    num_classes: int = NUM_CLASSES,
    descent: int = 0,
) -> list[dict[str, Any]]:
    """Training inputs: noise images cut into vertical stripes, one object a stripe.

    Each stripe begins ``descent`` pixels below the one on its left.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = counts or [2 + i % 3 for i in range(len(sizes))]
    inputs = []
    for image_id, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
        edges = torch.linspace(0, width - 4, count + 1).round().int()  # 4 columns stay void
        segment_map = torch.full((height, width), -1, dtype=torch.int16)
        boxes = torch.zeros(count, 4)
        for k in range(count):
            top = 2 + descent * k
            segment_map[top:, edges[k] : edges[k + 1]] = k
            boxes[k] = torch.tensor([edges[k], top, edges[k + 1], height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(num_classes, (count,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append(
            {
                "image": image,
                "instances": instances,
                "segment_map": segment_map,
                "height": height,
                "width": width,
                "image_id": image_id,
                "file_name": f"image_{image_id}.png",
            }
        )
    return inputs


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The training objective: the plain sum of the model's losses."""
    return torch.stack(list(losses.values())).sum()

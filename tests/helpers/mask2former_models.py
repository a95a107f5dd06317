"""Tiny and full-size Mask2Former models with random weights, and the same run in transformers."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.engine.setup import load_config
from helpers.commands import REPO_ROOT
from helpers.conversion_models import randomise

NUM_CLASSES = 7
COMMON: dict[str, Any] = {
    "MODEL.DETR.TRANSFORMER_NAME": "mask2former",
    "MODEL.DETR.COSTS": ["class_cost", "point_mask_cost"],
    "MODEL.DETR.LOSSES": ["class_loss", "point_mask_loss"],
    "MODEL.MASK_ON": True,
    "MODEL.MASK_HEAD.NAME": "query_mask_head",
}
TINY: dict[str, Any] = {
    **COMMON,
    "MODEL.DETR.NUM_OBJECT_QUERIES": 9,
    "MODEL.DETR.HIDDEN_DIM": 32,
    "MODEL.DETR.NHEADS": 4,
    "MODEL.DETR.DIM_FEEDFORWARD": 48,
    "MODEL.DETR.ENC_LAYERS": 2,
    "MODEL.DETR.DEC_LAYERS": 4,
    "MODEL.MASK2FORMER.MASK_DIM": 24,
    "MODEL.MASK2FORMER.ENC_DIM_FEEDFORWARD": 40,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet": {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    },
    "swin": {
        "MODEL.BACKBONE.NAME": "build_swin_backbone",
        "MODEL.SWIN.EMBED_DIM": 8,
        "MODEL.SWIN.DEPTHS": [1, 2, 2, 2],
        "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
        "MODEL.SWIN.WINDOW_SIZE": 3,
    },
}


def config(*parts: dict[str, Any], num_classes: int = NUM_CLASSES) -> CfgNode:
    """Base-DETR with further settings."""
    cfg = load_config(str(REPO_ROOT / "configs/Base-DETR.yaml"))
    settings = {"MODEL.DEVICE": "cpu", "MODEL.DETR.NUM_CLASSES": num_classes}
    for part in parts:
        settings |= part
    cfg.merge_from_list([value for pair in settings.items() for value in pair])
    return cfg


def tiny_config(backbone: str, **further: Any) -> CfgNode:
    """A tiny model; further keys have dots written as ``__``."""
    return config(
        TINY, BACKBONES[backbone], {key.replace("__", "."): v for key, v in further.items()}
    )


def random_model(cfg: CfgNode) -> PanopticDETR:
    """A model in which every norm, bias and statistic is random, too."""
    torch.manual_seed(0)
    model = build_model(cfg)
    assert isinstance(model, PanopticDETR)
    randomise(model)
    return model.eval()


def model_with(cfg: CfgNode, state: dict[str, Tensor]) -> PanopticDETR:
    model = build_model(cfg)
    assert isinstance(model, PanopticDETR)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def predict_ours(model: PanopticDETR, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (B, Q, K + 1) and mask logits (B, Q, h, w) of the last layer."""
    model.to(images.dtype)
    height, width = images.shape[-2:]
    predictions = model.predict(
        model.backbone(images), [(height, width)] * len(images), (height, width)
    )
    batch, queries = predictions.logits.shape[1:3]
    image = torch.arange(batch).repeat_interleave(queries)
    query = torch.arange(queries).repeat(batch)
    masks = predictions.last_masks(image, query).unflatten(0, (batch, queries))
    return predictions.logits[-1], masks


@torch.no_grad()
def predict_theirs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a Mask2Former of transformers."""
    output = model.to(images.dtype).eval()(pixel_values=images)
    return output.class_queries_logits, output.masks_queries_logits

"""A tiny image classifier for tests: 16 pixels, patches of 4, width 32, four blocks."""

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from batchformer_panoptic import add_batchformer_panoptic_config
from batchformer_panoptic.modeling.image_classifier import ImageClassifier

NUM_CLASSES = 5
IMAGE_SIZE = 16
ARGUMENTS = [["patch_size", 4], ["embed_dim", 32], ["depth", 4], ["num_heads", 4]]


def classifier_cfg(**overrides: Any) -> CfgNode:
    """Its config, without mixing and drop path; overrides are keys with dots written as ``__``."""
    pytest.importorskip("timm")
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [128.0] * 3, [64.0] * 3
    node = cfg.MODEL.CLASSIFIER
    node.NAME, node.IMAGE_SIZE, node.TIMM_KWARGS = "vit_tiny_patch16_224", IMAGE_SIZE, ARGUMENTS
    node.NUM_CLASSES, node.DROP_PATH = NUM_CLASSES, 0.0
    node.MIXUP_ALPHA = node.CUTMIX_ALPHA = 0.0
    cfg.MODEL.BATCHFORMER.INSERT_LAYERS = [2]
    cfg.MODEL.BATCHFORMER.DROPOUT = 0.0
    cfg.merge_from_list([x for k, v in overrides.items() for x in (k.replace("__", "."), v)])
    return cfg


def tiny_classifier(**overrides: Any) -> ImageClassifier:
    """Build :func:`classifier_cfg` with every parameter random, in training mode."""
    torch.manual_seed(0)
    model = build_model(classifier_cfg(**overrides))
    assert isinstance(model, ImageClassifier)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def labelled_images(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Noise with labels, as the mapper returns it."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return [
        {"image": image, "label": int(label), "image_id": i, "file_name": f"image_{i}.png"}
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]

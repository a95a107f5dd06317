"""Tiny Deformable-DETR models with perturbed weights."""

import zlib

import torch

from helpers.tiny_model import random_inputs, tiny_model

DEFORMABLE = {"MODEL__DETR__TRANSFORMER_NAME": "deformable", "MODEL__DETR__SCORING": "focal"}
REFINE = {"MODEL__DEFORMABLE__BOX_REFINE": True}
TWO_STAGE = {**REFINE, "MODEL__DEFORMABLE__TWO_STAGE": True}
BLOCK = {"MODEL__BATCHFORMER__ENABLED": True}
SIZES = [(48, 64), (64, 56), (40, 40)]
KINDS = {"plain": {}, "refine": REFINE, "two_stage": TWO_STAGE}


def make(**overrides):
    """A tiny model with perturbed weights: fresh ones give constant offsets and boxes."""
    model = tiny_model(**DEFORMABLE, **overrides)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            perturb(name, parameter)
        for name, parameter in model.box_head.named_parameters():
            perturb(name, parameter)
    return model


def perturb(name, parameter):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def predictions(model, sizes=SIZES):
    images = model.preprocess(random_inputs(sizes))
    features = model.backbone(images.tensor)
    return model.predict(features, images.image_sizes, tuple(images.tensor.shape[-2:]))

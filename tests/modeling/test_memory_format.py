from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from batchformer_panoptic.engine import load_config
from batchformer_panoptic.modeling.cpu import convolution_format
from helpers.tiny_model import random_inputs, tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("convolution", "expected"),
    [
        (nn.Conv2d(8, 32, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(32, 32, 1, stride=2, groups=4), torch.contiguous_format),
        (nn.Conv2d(8, 32, 1, stride=(1, 2)), torch.contiguous_format),
        (nn.Conv2d(16, 32, 1, stride=2), torch.channels_last),
        (nn.Conv2d(8, 32, 1), torch.channels_last),
        (nn.Conv2d(8, 32, 3, stride=2, padding=1), torch.channels_last),
    ],
)
def test_channels_last_unless_a_convolution_breaks_it(convolution, expected):
    assert convolution_format(nn.Sequential(nn.Conv2d(3, 8, 3), convolution)) == expected


def test_the_published_backbone_may_lie_channels_last_and_the_tiny_one_may_not():
    published = load_config(str(ROOT / "configs/coco/panoptic/detr_R50_joint_300ep.yaml"), [])
    assert convolution_format(build_backbone(published)) == torch.channels_last
    assert tiny_model().cpu_format == torch.contiguous_format


@pytest.mark.parametrize("chosen", [torch.channels_last, torch.contiguous_format])
def test_images_and_maps_of_the_backbone_keep_the_order(chosen):
    model = tiny_model()
    model.cpu_format = chosen
    images = model.preprocess(random_inputs([(40, 48), (33, 64)])).tensor
    maps = [images, *model.backbone(images).values()]
    assert all(x.is_contiguous(memory_format=chosen) for x in maps)

"""Swin Transformer: maps of any image size, batches, stochastic depth, freezing, training.

The conversion tests compare its maps with those of transformers.
"""

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.modeling.backbone import SwinBackbone, build_swin_backbone
from batchformer_panoptic.modeling.backbone.swin import SwinBlock, to_windows
from helpers.mask2former_models import COMMON
from helpers.tiny_model import random_inputs, tiny_cfg, tiny_model

SWIN = {
    "MODEL__BACKBONE__NAME": "build_swin_backbone",
    "MODEL__SWIN__EMBED_DIM": 8,
    "MODEL__SWIN__DEPTHS": [1, 2, 1, 2],
    "MODEL__SWIN__NUM_HEADS": [1, 2, 2, 4],
    "MODEL__SWIN__WINDOW_SIZE": 3,
    "MODEL__BACKBONE__FREEZE_AT": 0,
}
MASK2FORMER: dict[str, Any] = {key.replace(".", "__"): value for key, value in COMMON.items()}


def swin(**overrides: Any) -> SwinBackbone:
    torch.manual_seed(0)
    backbone = build_swin_backbone(tiny_cfg(**{**SWIN, **overrides}), ShapeSpec(channels=3))
    assert isinstance(backbone, SwinBackbone)
    return backbone


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (65, 94)])
def test_maps_have_the_declared_shapes(size: tuple[int, int]) -> None:
    backbone = swin()
    maps = backbone(torch.randn(2, 3, *size))
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == ["res2", "res3", "res4", "res5"]
    for name, shape in shapes.items():
        stride = shape.stride
        assert stride is not None
        cells = [-(-side // stride) for side in size]
        assert maps[name].shape == (2, shape.channels, *cells)
    assert backbone.size_divisibility == 32


def test_windows_are_ordered_row_by_row() -> None:
    x = torch.arange(24.0).view(1, 4, 6, 1)
    windows = to_windows(x, 2)
    assert windows.shape == (6, 4, 1)
    assert windows[1, :, 0].tolist() == [2, 3, 8, 9]
    assert windows[3, :, 0].tolist() == [12, 13, 18, 19]


def test_an_image_does_not_depend_on_its_batch() -> None:
    backbone = swin().double().eval()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    for name, value in backbone(images).items():
        torch.testing.assert_close(backbone(images[1:2])[name], value[1:2], msg=name)


def test_a_skipped_branch_is_made_up_for() -> None:
    torch.manual_seed(0)
    block = SwinBlock(8, window=2, shift=1, num_heads=2, drop_path=0.5).train()
    x = torch.randn(400, 4, 4, 8)
    branch = block._kept(torch.ones_like(x))
    per_image = branch[:, 0, 0, 0]
    assert set(per_image.tolist()) == {0.0, 2.0}
    assert (branch == per_image[:, None, None, None]).all()
    assert 0.8 < per_image.mean() < 1.2
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("freeze_at", range(6))
def test_everything_up_to_a_map_is_frozen(freeze_at: int) -> None:
    backbone = swin(MODEL__BACKBONE__FREEZE_AT=freeze_at)
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    expected = ["patch_embed."] if freeze_at else []
    for i in range(freeze_at - 1):
        expected += [f"layers.{i}.blocks.", f"norm{i}."]
    expected += [f"layers.{i}.downsample." for i in range(freeze_at - 2)]
    names = {name for name, _ in backbone.named_parameters()}
    assert frozen == {name for name in names if name.startswith(tuple(expected))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__SWIN__DEPTHS": [1, 1]}, "needs four"),
        ({"MODEL__SWIN__NUM_HEADS": [3, 2, 2, 4]}, "must divide"),
        ({"MODEL__BACKBONE__FREEZE_AT": 6}, "choose 0 to 5"),
    ],
)
def test_unusable_settings_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        swin(**overrides)


def test_every_parameter_is_trained() -> None:
    model = tiny_model(
        **SWIN, **MASK2FORMER, MODEL__SWIN__DROP_PATH_RATE=0.0, MODEL__MASK2FORMER__NUM_POINTS=32
    ).train()
    losses = model(random_inputs([(64, 96), (60, 64)]))
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, p in model.backbone.named_parameters() if p.grad is None]
    assert without == []

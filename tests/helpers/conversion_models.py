"""Weights of other projects in miniature, and models of both sides run on the same images."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.engine.setup import load_config
from helpers.commands import REPO_ROOT

WIDTHS = (16, 32, 64, 128)
R50_DEPTHS = (3, 4, 6, 3)
ATOL = 1e-5
# --dynamic_scale of gaopengcuhk/SMCA-DETR: MODEL.SMCA.DYNAMIC_SCALE.
DYNAMIC_SCALE_OF_FLAG = {
    "type1": "fixed",
    "type2": "isotropic",
    "type3": "per_axis",
    "type4": "per_axis_and_product",
}


class Predicted(NamedTuple):
    """Logits (B, Q, K + 1), boxes (B, Q, 4) and mask logits (B, Q, h, w) or None."""

    logits: Tensor
    boxes: Tensor
    masks: Tensor | None


def torchvision_resnet(
    widths: tuple[int, ...] = WIDTHS, depths: tuple[int, ...] = (1, 1, 1, 1)
) -> dict[str, Tensor]:
    """Random weights of a bottleneck ResNet in torchvision's names, its stem as wide as layer1."""
    state: dict[str, Tensor] = {}

    def conv_norm(conv: str, norm: str, n_in: int, n_out: int, kernel: int) -> None:
        fan_in = n_in * kernel**2
        state[f"{conv}.weight"] = torch.randn(n_out, n_in, kernel, kernel) * (2 / fan_in) ** 0.5
        state[f"{norm}.weight"] = torch.empty(n_out).uniform_(0.4, 0.8)
        state[f"{norm}.bias"] = torch.randn(n_out) * 0.1
        state[f"{norm}.running_mean"] = torch.randn(n_out) * 0.1
        state[f"{norm}.running_var"] = torch.empty(n_out).uniform_(0.5, 2.0)

    conv_norm("conv1", "bn1", 3, n_in := widths[0], 7)
    for layer, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        for index in range(depth):
            block, inner = f"layer{layer}.{index}", width // 4
            conv_norm(f"{block}.conv1", f"{block}.bn1", n_in, inner, 1)
            conv_norm(f"{block}.conv2", f"{block}.bn2", inner, inner, 3)
            conv_norm(f"{block}.conv3", f"{block}.bn3", inner, width, 1)
            if n_in != width:
                conv_norm(f"{block}.downsample.0", f"{block}.downsample.1", n_in, width, 1)
            n_in = width
    return state


def recorded(file_name: str, key: str = "state_dict") -> dict[str, Tensor]:
    """Weights of the public code, official names, from the copies kept with the tests."""
    content = torch.load(REPO_ROOT / "tests" / "golden" / file_name, weights_only=True)
    return {name: value.float() for name, value in content[key].items()}


def official_backbone(**kwargs: Any) -> dict[str, Tensor]:
    return {
        f"backbone.0.body.{name}": value for name, value in torchvision_resnet(**kwargs).items()
    }


def official_panoptic(**kwargs: Any) -> dict[str, Tensor]:
    """A whole DETRsegm: recorded weights of the public code behind a random backbone."""
    backbone = {f"detr.{name}": value for name, value in official_backbone(**kwargs).items()}
    return {**backbone, **recorded("detr_panoptic.pt")}


def official_boxes() -> dict[str, Tensor]:
    """A whole DETR without masks, recorded weights behind a random backbone."""
    backbone = official_backbone(widths=(8, 16, 32, 48))
    return {**backbone, **recorded("detr_box_batchformer_small.pt")}


def our_model(settings: dict[str, Any], state: dict[str, Tensor], *opts: Any) -> PanopticDETR:
    """The model that the settings of a conversion describe, with its weights."""
    cfg = load_config(str(REPO_ROOT / "configs/Base-DETR.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DETR.NUM_CLASSES = state["box_head.class_embed.weight"].shape[0] - 1
    cfg.merge_from_list([part for pair in settings.items() for part in pair] + list(opts))
    model = build_model(cfg)
    model.load_state_dict(state)
    assert isinstance(model, PanopticDETR)
    return model.eval()


def random_images(sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Normalised images (B, 3, H, W), zero in the padding, and (B, H, W) int64, 1 where valid.

    Images and models of the comparisons are in double precision, where two orders of summation
    do not differ by more than a mistake would.
    """
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = torch.zeros(len(sizes), 3, height, width, dtype=torch.float64)
    valid = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for image, mask, (h, w) in zip(images, valid, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w)
        mask[:h, :w] = 1
    return images, valid


@torch.no_grad()
def run_ours(model: PanopticDETR, images: Tensor, sizes: list[tuple[int, int]]) -> Predicted:
    """Predictions of the last layer, masks of all queries."""
    model.to(images.dtype)
    features = model.backbone(images)
    height, width = images.shape[-2:]
    predictions = model.predict(features, sizes, (height, width))
    masks = None
    if model.mask_head is not None:
        batch, queries = predictions.logits.shape[1:3]
        image_index = torch.arange(batch).repeat_interleave(queries)
        query_index = torch.arange(queries).repeat(batch)
        masks = predictions.last_masks(image_index, query_index)
        masks = masks.unflatten(0, (batch, queries))
    return Predicted(predictions.logits[-1], predictions.boxes[-1], masks)


@torch.no_grad()
def run_theirs(model: nn.Module, images: Tensor, valid: Tensor) -> Predicted:
    """Predictions of a DETR of transformers."""
    model.to(images.dtype)
    output = model.eval()(pixel_values=images, pixel_mask=valid)
    return Predicted(output.logits, output.pred_boxes, getattr(output, "pred_masks", None))


def assert_same(ours: Predicted, theirs: Predicted, *, atol: float = ATOL) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert other is not None
            torch.testing.assert_close(mine, other, atol=atol, rtol=0, check_dtype=False)


def randomise(model: nn.Module) -> None:
    """Give norms, biases and statistics values that a mistake would not leave unnoticed."""
    with torch.no_grad():
        for name, value in model.state_dict().items():  # constants are not part of it
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif value.dim() == 1 and value.is_floating_point():
                value.uniform_(0.5, 1.0)


def save_checkpoint(state: dict[str, Tensor], path: Path, **rest: Any) -> str:
    torch.save({"model": state, **rest}, path)
    return str(path)


def coco_panoptic() -> dict[str, Tensor]:
    """A DETRsegm with 250 class rows that Detectron2 can build."""
    state = official_panoptic(depths=R50_DEPTHS)
    return {
        **state,
        "detr.class_embed.weight": torch.randn(251, 128),
        "detr.class_embed.bias": torch.arange(251.0),
    }

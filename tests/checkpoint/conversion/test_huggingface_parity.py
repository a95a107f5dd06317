"""A full-size panoptic DETR in official layout: this project and transformers predict the same."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from batchformer_panoptic.checkpoint import PanopticCheckpointer
from batchformer_panoptic.engine.setup import load_config
from helpers.commands import REPO_ROOT, load_script
from helpers.conversion_models import Predicted, run_ours, run_theirs

CONFIG = "configs/coco/panoptic/detr_R50_joint_300ep.yaml"
NUM_CLASSES, NUM_QUERIES, WIDTH, HEADS = 250, 100, 256, 8
HEIGHT, WIDTH_PX = 256, 320
ATOL = 1e-4


def official_weights() -> dict[str, Tensor]:
    """Random weights in the names of facebookresearch/detr, from PyTorch's own modules.

    Scaled so that no part saturates; statistics of the frozen batch norms are random, too.
    """
    resnet = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d)
    with torch.no_grad():
        for name, value in resnet.named_buffers():
            if name.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            else:  # residual branches are small, or sixteen of them would add up to too much
                low, high = (0.2, 0.5) if ".bn3." in name else (0.6, 1.2)
                value.uniform_(low, high)
    layers = nn.Transformer(WIDTH, HEADS, 6, 6, 2048)
    detector = {
        **{f"backbone.0.body.{k}": v for k, v in resnet.state_dict().items() if "fc." not in k},
        # Post-norm encoders of DETR have no last norm.
        **{
            f"transformer.{k}": v
            for k, v in layers.state_dict().items()
            if not k.startswith("encoder.norm.")
        },
        "query_embed.weight": torch.randn(NUM_QUERIES, WIDTH),
        **prefixed("input_proj", nn.Conv2d(2048, WIDTH, 1)),
        **prefixed("class_embed", nn.Linear(WIDTH, NUM_CLASSES + 1)),
        **prefixed("bbox_embed.layers.0", nn.Linear(WIDTH, WIDTH)),
        **prefixed("bbox_embed.layers.1", nn.Linear(WIDTH, WIDTH)),
        **prefixed("bbox_embed.layers.2", nn.Linear(WIDTH, 4)),
    }
    mixed = WIDTH + HEADS
    widths = [mixed, mixed, 128, 64, 32, 16]
    mask_head = {
        **prefixed("bbox_attention.q_linear", nn.Linear(WIDTH, WIDTH)),
        **prefixed("bbox_attention.k_linear", nn.Linear(WIDTH, WIDTH)),
        **prefixed("mask_head.out_lay", nn.Conv2d(16, 1, 3)),
    }
    for i in range(5):
        mask_head |= prefixed(f"mask_head.lay{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3))
        mask_head |= prefixed(f"mask_head.gn{i + 1}", nn.GroupNorm(8, widths[i + 1]))
    for i, channels in enumerate((1024, 512, 256)):
        mask_head |= prefixed(f"mask_head.adapter{i + 1}", nn.Conv2d(channels, widths[i + 2], 1))
    state = {**{f"detr.{name}": value for name, value in detector.items()}, **mask_head}
    return {name: _telling(name, value) for name, value in state.items()}


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def _telling(name: str, value: Tensor) -> Tensor:
    """Initial values make all queries predict the same; these make queries and pixels differ."""
    if "backbone" in name:
        return value
    if value.dim() == 1:  # norms of ones and biases of zeros would hide that they were swapped
        return value + 0.1 * torch.randn_like(value)
    if name.endswith("in_proj_weight"):
        query_key, of_values = value.split([2 * WIDTH, WIDTH])
        return torch.cat([8 * query_key, of_values])
    if name == "mask_head.lay1.weight":
        of_image, of_attention = value.split([WIDTH, HEADS], dim=1)
        return torch.cat([of_image, 300 * of_attention], dim=1)
    gains = {
        "input_proj": 4,
        "multihead_attn.out_proj": 4,
        "bbox_attention": 6,
        "class_embed": 5,
        "bbox_embed.layers.2": 5,
        "mask_head.lay": 2,
    }
    return value * next((gain for part, gain in gains.items() if part in name), 1)


# From official names to those in files of transformers, one substitution after the other. Written
# down here a second time on purpose: a mistake in the package's tables would move weights to the
# same wrong place in both models.
RENAMES = [
    (r"backbone\.0\.body", "model.backbone.conv_encoder.model"),
    (r"encoder\.model\.conv1\.", "encoder.model.embedder.embedder.convolution."),
    (r"encoder\.model\.bn1\.", "encoder.model.embedder.embedder.normalization."),
    *((rf"model\.layer{i + 1}\.", f"model.encoder.stages.{i}.layers.") for i in range(4)),
    *((rf"(stages.*)\.conv{i + 1}\.", rf"\1.layer.{i}.convolution.") for i in range(3)),
    *((rf"(stages.*)\.bn{i + 1}\.", rf"\1.layer.{i}.normalization.") for i in range(3)),
    (r"downsample\.0", "shortcut.convolution"),
    (r"downsample\.1", "shortcut.normalization"),
    (r"detr\.transformer", "detr.model"),
    (r"decoder\.norm\.", "decoder.layernorm."),
    (r"(encoder.*)\.norm2\.", r"\1.final_layer_norm."),
    (r"norm1\.", "self_attn_layer_norm."),
    (r"norm2\.", "encoder_attn_layer_norm."),
    (r"norm3\.", "final_layer_norm."),
    (r"linear(\d)", r"fc\1"),
    (r"multihead_attn", "encoder_attn"),
    (r"query_embed", "model.query_position_embeddings"),
    (r"input_proj", "model.input_projection"),
    (r"class_embed", "class_labels_classifier"),
    (r"bbox_embed", "bbox_predictor"),
]


def huggingface_weights(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as transformers names them in a file."""
    state = {}
    for name, value in official.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        prefix, found, part = name.partition("in_proj_")
        if found:
            for which, chunk in zip("qkv", value.chunk(3), strict=True):
                state[f"{prefix}{which}_proj.{part}"] = chunk
        else:
            state[name] = value
    return state


def image_of_blobs() -> Tensor:
    """A normalised image with structure at the scale of the tokens, and noise."""
    blobs = torch.randn(1, 3, HEIGHT // 16, WIDTH_PX // 16)
    blobs = F.interpolate(blobs, size=(HEIGHT, WIDTH_PX), mode="bilinear")
    return 1.5 * blobs + 0.3 * torch.randn_like(blobs)


@pytest.mark.slow
def test_full_size_panoptic_model_is_that_of_transformers(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    transformers = pytest.importorskip("transformers")
    weights, official = official_weights(), tmp_path / "official.pth"
    torch.save({"model": weights}, official)
    converted, exported = tmp_path / "converted.pth", tmp_path / "exported"
    options = [str(official), str(converted), "--source", "detr", "--classes", "all"]
    assert load_script("tools/convert_checkpoint.py").main(options) == 0
    options = [str(converted), str(exported), "--format", "huggingface"]
    options += ["--config-file", str(REPO_ROOT / CONFIG), "--opts", "MODEL.DEVICE", "cpu"]
    assert load_script("tools/export_checkpoint.py").main(options) == 0

    expected, found = huggingface_weights(weights), load_file(exported / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    images = image_of_blobs()
    ours = predict_ours(converted, images)
    model = transformers.DetrForSegmentation.from_pretrained(exported)
    theirs = run_theirs(model, images, torch.ones(1, HEIGHT, WIDTH_PX, dtype=torch.int64))

    assert theirs.logits.shape == (1, NUM_QUERIES, NUM_CLASSES + 1)
    assert theirs.masks is not None
    assert theirs.masks.shape == (1, NUM_QUERIES, HEIGHT // 4, WIDTH_PX // 4)
    for name, mine, other in zip(Predicted._fields, ours, theirs, strict=True):
        spread = other.std(dim=1).mean().item()
        assert spread > 20 * ATOL, f"{name}: all queries predict nearly the same"
        difference = (mine - other).abs().max().item()
        record_property(f"largest difference of {name}", difference)
        assert difference < ATOL, name


def predict_ours(weights: Path, images: Tensor) -> Predicted:
    cfg = load_config(str(REPO_ROOT / CONFIG), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    model = build_model(cfg).eval()
    PanopticCheckpointer(model).load(str(weights), checkpointables=[])
    return run_ours(model, images, [(HEIGHT, WIDTH_PX)])

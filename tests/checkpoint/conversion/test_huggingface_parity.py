"""A full-size panoptic DETR in official layout: this project and transformers predict the same."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from batchformer_panoptic.checkpoint import PanopticCheckpointer
from batchformer_panoptic.engine.setup import load_config
from helpers.commands import REPO_ROOT, load_script
from helpers.conversion_models import Predicted, run_ours, run_theirs
from helpers.official_detr import NUM_CLASSES, NUM_QUERIES, official_weights

CONFIG = "configs/coco/panoptic/detr_R50_joint_300ep.yaml"
HEIGHT, WIDTH_PX = 256, 320
ATOL = 1e-4


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

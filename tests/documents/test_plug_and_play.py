"""The Python code of docs/plug_and_play.md and README.md runs as printed."""

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from batchformer_panoptic.batchformer import attach
from helpers.commands import REPO_ROOT

BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def blocks(document: str) -> list[str]:
    return BLOCK.findall((REPO_ROOT / document).read_text())


@pytest.mark.parametrize("document", ["README.md", "docs/plug_and_play.md"])
def test_three_lines(document):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4)
    names: dict[str, Any] = {
        "model": model,
        "images": torch.rand(2, 3, 32, 32),
        "targets": torch.tensor([0, 3]),
        "criterion": F.cross_entropy,
        "metric": lambda logits, targets: (logits.argmax(1) == targets).float().mean(),
    }
    (block,) = [text for text in blocks(document) if re.search(r"attach\(\s*model", text)]
    exec(block, names)
    assert names["loss"].isfinite()
    assert 0 <= names.get("accuracy", 0) <= 1
    assert len(model(names["images"])) == 4
    names["bf"].detach()
    assert len(model(names["images"])) == 2


def test_context_of_detr():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5, num_labels=3,
    )  # fmt: skip
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    names: dict[str, Any] = {
        "attach": attach,
        "config": config,
        "pixel_values": torch.rand(2, 3, 32, 32),
        "labels": [label, label],
    }
    exec(blocks("docs/plug_and_play.md")[1], names)
    assert names["loss"].isfinite()
    assert list(names["bf"]._context) == ["model.encoder.layers.1", "model.decoder"]


def test_image_level():
    timm = pytest.importorskip("timm")
    names: dict[str, Any] = {
        "attach": attach,
        "resnet": timm.create_model("resnet10t", num_classes=4),
        "images": torch.rand(2, 3, 32, 32),
        "labels": torch.tensor([0, 3]),
        "criterion": F.cross_entropy,
    }
    exec(blocks("docs/plug_and_play.md")[2], names)
    assert names["loss"].isfinite()


def test_several_processes():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=4)
    names: dict[str, Any] = {"attach": attach, "vit": vit}
    exec(blocks("docs/plug_and_play.md")[3], names)
    cells = sum(height * width for height, width in names["bf"].map_sizes)
    assert cells == vit.pos_embed.shape[1]
    assert names["bf"].hook.sync
    assert len(blocks("docs/plug_and_play.md")) == 4
